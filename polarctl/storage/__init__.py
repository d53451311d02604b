"""What runs read and write: records, growing files, manifests, run folders, checkpoints."""
