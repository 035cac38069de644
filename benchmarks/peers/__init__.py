"""The libraries that the model is compared with: what runs in their own environment, benchmarks/peers/.venv."""
