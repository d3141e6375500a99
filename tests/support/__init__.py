"""What several tests share: tiny models, engines, clients, and a simulation of vLLM's steps."""
