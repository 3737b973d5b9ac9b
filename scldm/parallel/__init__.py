START_S = 600.0  # until the first mark of a rank: data are opened, networks made and compiled
