"""The tests. Importing this package keeps them off the network and torch to one thread."""

import os
import signal

# Set before anything imports huggingface_hub, which reads it only then: no test waits for a network, or writes to the
# Hub with the user's token, except in `HF_HUB_OFFLINE=0 pytest -m hub`.
if os.environ.get("HF_HUB_OFFLINE") != "0":
    os.environ["HF_HUB_OFFLINE"] = "1"
    # The tests' own servers are on the loopback, where no proxy is needed.
    for _name in [*os.environ]:
        if _name.lower() in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "hf_endpoint"):
            del os.environ[_name]
# Several test processes run at the same time, so more than one torch thread per process would not help.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A background job of a shell script ignores Ctrl-C, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
