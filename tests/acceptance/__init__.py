"""The course's scenarios, re-made as named tests of our own with their limits."""
