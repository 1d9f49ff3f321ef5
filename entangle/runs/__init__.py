"""What a run writes and reads back: manifests, digests, unfinished work, progress."""
