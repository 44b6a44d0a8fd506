"""What has samples made while the trainer trains: prompts to completions, to rewards, into a queue."""
