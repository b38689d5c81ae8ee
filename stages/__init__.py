"""What happens to tensors: one file a stage. Stages are pure; they import values from `pipeline`, never how work is run."""
