"""The tests. Importing this package keeps huggingface_hub offline and torch to one thread."""

import os
import signal

# Set before anything imports huggingface_hub, which reads it only then: no test waits for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Several test processes run at the same time, so more than one torch thread per process would not help.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A background job of a shell script ignores Ctrl-C, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
