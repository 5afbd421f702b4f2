"""What every trainer stands on: data, settings, processes, a run's files, and what is watched."""
