"""Server processes: which model gets one, which one makes room, and the life of each."""
