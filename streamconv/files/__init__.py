"""Files by location: on this machine, at an http URL, or in a store that fsspec reaches."""
