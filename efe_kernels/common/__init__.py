"""What two families really share: op declaration, argument checks, extension loading, Triton math."""
