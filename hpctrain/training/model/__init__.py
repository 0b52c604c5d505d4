"""What is done to the bare model: its call and names, precision, passes that leave no trace."""
