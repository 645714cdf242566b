"""The DeepSpeed engine: ZeRO 1–3, its config, shards and files."""
