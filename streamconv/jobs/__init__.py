"""The jobs of the library, one per module. They only combine the steps that the packages below implement."""
