"""From the completions of a group to their rewards and advantages, whatever the reward functions do."""
