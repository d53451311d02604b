"""What reading and writing are made of: compressed files, files that grow, whose output it is."""
