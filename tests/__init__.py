import os

# Before anything imports huggingface_hub, which reads it once: a test never waits for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Test processes run side by side; threads of torch beyond one per process would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
