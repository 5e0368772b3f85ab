"""Files by location: on this machine, at an http address, or in a store that fsspec reaches."""
