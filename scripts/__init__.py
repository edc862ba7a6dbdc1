"""
The programs: `python -m scripts.NAME --help`.

Python imports this package before the program, and so before torch. OpenMP reads its settings when torch is loaded:
idle threads spin for 40 µs and then sleep. Training speed on two cores (depth 4, compiled), median tokens/s:

                                             alone    beside another busy process
  this setting                               7,800    4,100
  no spinning (OMP_WAIT_POLICY=PASSIVE)      7,500    4,400
  OpenMP's default                           7,300    2,700

Beside another busy process, spinning ten times as long is already as slow as the default.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")
