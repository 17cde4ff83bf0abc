"""What goes beyond the paper: a search whose reward similar questions share, and other methods beside the routers."""
