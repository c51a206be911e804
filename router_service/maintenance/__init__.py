"""What is done to memories beside reading and writing them: snapshots."""
