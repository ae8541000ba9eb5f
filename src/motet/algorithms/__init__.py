"""Every algorithm, by the name it has on the command line. A plain dictionary: nothing registers itself."""

from motet.algorithms.fedvpa import FedVPA, FedVPASettings

ALGORITHMS = {"fedvpa": (FedVPA, FedVPASettings)}
