"""What is watched while a run goes on: metrics, time, the plan of a step, callbacks."""
