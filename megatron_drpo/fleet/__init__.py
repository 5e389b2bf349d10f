"""The rollout servers of a run, on this machine or on a Ray cluster: started, watched, restarted, ended."""
