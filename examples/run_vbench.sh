#!/usr/bin/env bash
# Run VBench, in its own environment, on the output of `pisces-rl vbench export`: see docs/vbench.md.
#
#   examples/run_vbench.sh ENVIRONMENT VBENCH FOLDER...
#   examples/run_vbench.sh vbench-env VBench outputs/vbench/base outputs/vbench/trained
#
# ENVIRONMENT has VBench installed, VBENCH is a clone of it, each FOLDER holds videos/; scores go to FOLDER/results.
# Dimensions that already have a result there are skipped. DIMENSIONS="color scene" scores only these.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
environment=$1 vbench=$2
shift 2
suite=$vbench/vbench/VBench_full_info.json
[ -x "$environment/bin/vbench" ] || { echo "$environment/bin/vbench is missing: install VBench in $environment" >&2; exit 2; }
[ -f "$suite" ] || { echo "$suite is missing: $vbench is not a clone of VBench" >&2; exit 2; }
all="subject_consistency background_consistency motion_smoothness dynamic_degree aesthetic_quality imaging_quality
    object_class multiple_objects human_action color spatial_relationship scene appearance_style temporal_style
    overall_consistency temporal_flickering"
for folder; do
  [ -d "$folder/videos" ] || { echo "$folder/videos is missing: run \`pisces-rl vbench export\` first" >&2; exit 2; }
  for dimension in ${DIMENSIONS:-$all}; do
    if compgen -G "$folder/results/$dimension/*eval_results.json" > /dev/null; then continue; fi
    videos=$folder/videos
    if [ "$dimension" = temporal_flickering ]; then # of static videos, picked out of 25 a prompt
      "$environment/bin/python" "$vbench/static_filter.py" --videos_path "$videos" --result_path "$folder/static"
      videos=$folder/static/filtered_videos
    fi
    "$environment/bin/vbench" evaluate --videos_path "$videos" --dimension "$dimension" --full_json_dir "$suite" \
      --output_path "$folder/results/$dimension"
  done
done
