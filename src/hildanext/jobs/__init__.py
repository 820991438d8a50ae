"""Jobs: the commands of the CLI, run for a server that may die and come back. No job is lost, none runs twice."""
