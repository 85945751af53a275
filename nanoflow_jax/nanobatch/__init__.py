"""Operations of a layer, plans that split and order them, and the path that runs a plan."""
