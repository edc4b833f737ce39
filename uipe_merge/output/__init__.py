"""The output directory: staged, journalled, made durable and published by one rename."""
