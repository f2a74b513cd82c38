"""What an experiment needs of its machines, before it has any: memory of a process, samples a second, days."""
