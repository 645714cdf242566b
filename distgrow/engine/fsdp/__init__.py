"""The FSDP engine: torch's fully_shard, its units, shards and files."""

#: The folder of DCP's files in a checkpoint, and the file of all that is no shard.
FOLDER, HEAD = "fsdp", "fsdp.pt"
