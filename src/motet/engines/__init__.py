"""How clients are reached: in this process, or over a network."""
