"""What ties the stages: the command line, recipes, launching, the demo."""
