"""A model's folder as OpenVINO's files, in bfloat16 as it is stored: `python -m runners.to_openvino FOLDER OUTPUT`.

The converter's command makes int8 of whatever has a billion parameters or more, unless a configuration says otherwise.
"""

import sys

from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig

if __name__ == "__main__":
    main_export(sys.argv[1], sys.argv[2], task="text-generation-with-past", ov_config=OVConfig())
