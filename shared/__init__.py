"""What the door and the workers both speak: states, routing, settings, schema, the narrow lock, calls, statuses."""
