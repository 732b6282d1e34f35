"""What completes prompts with the policy's weights; ``by_name`` holds the choice."""
