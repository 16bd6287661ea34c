"""What libraries read from the environment when torch is imported, for each role that imports it. Imports nothing itself."""

TORCH_ENVIRONMENT = {
    # OpenMP's threads spin while they wait, and where processes share cores that takes nearly all of the time
    # (training at load 12: 12 tokens per second with the default, 131 with this; on a quiet machine 10 % less than with the default).
    "GOMP_SPINCOUNT": "1000",
    # oneDNN keeps code for each shape of a product, 0.3 MB each, and ideep between it and torch keeps as much once more. Records of mixed
    # lengths give new shapes at each step: with the defaults, 1,024 of each, a training grows by 0.1 GB per step until it has 0.6 GB more.
    # A micro-batch uses some 100 shapes, over and over. Without the second cache products take as long as with it.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    "LRU_CACHE_CAPACITY": "1",
}
# The engine's threads wait awake for as long as two products lie apart; inference/spinning.py sees to it that they do only when alone.
ENGINE_ENVIRONMENT = TORCH_ENVIRONMENT | {"GOMP_SPINCOUNT": "20000"}
# Who imports torch. The others set nothing: their children would inherit it.
ENVIRONMENTS = {"engine": ENGINE_ENVIRONMENT, "train": TORCH_ENVIRONMENT, "index": TORCH_ENVIRONMENT, "batch": TORCH_ENVIRONMENT}
