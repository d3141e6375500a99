"""vLLM's real engine core with many requests, and a device that checks what it reads. No model.

The device keeps one number for each token's KV and one for each picture, and executes steps in the
order in which it got them, when a seed says so or when the engine waits for one. Everything that a
run does follows from its seed: traffic, settings, faults, and where between the engine's calls they
happen.
"""
