"""The contract between the stages: keys, shards, manifests, snapshots, the store. No model code."""
