#!/usr/bin/env bash
# Builds the libraries of the null GPU against a CUDA build of torch, in seconds:  bash build.sh VENV OUT
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
packages=$(echo "$(cd "$1" && pwd)"/lib/python3*/site-packages)
mkdir -p "$2"
out=$(cd "$2" && pwd)
# The second folder is there for its crt/, which the first lacks.
include=(-I"$packages/nvidia/cu13/include" -idirafter "$packages/triton/backends/nvidia/include")

library() {  # library FILE SONAME OPTIONS…: with its symbols under the version SONAME, as torch expects them
  echo "$2 { global: *; };" >"$out/$2.map"
  g++ -std=c++17 -O1 -w -shared -fPIC -fvisibility=hidden "${include[@]}" "$1" "${@:3}" \
    -Wl,--version-script="$out/$2.map" -Wl,-soname,"$2" -o "$out/$2"
}

missing() {  # missing FILE PATTERN: C++ functions for those that torch's libraries need and FILE does not define
  nm -D --undefined-only "$packages"/torch/lib/libtorch_cuda*.so "$packages"/nvidia/cu13/lib/libcusolver*.so* |
    sed -nE "s/.* U ($2\w*)@.*/\1/p" | sort -u | while read -r name; do
    if grep -qw "$name" "$1"; then continue; fi
    case $name in
      *gemm* | *Gemm* | *gemv*) echo "API int $name() { return nullgpu_cublas_product(\"$name\"); }" ;;
      *) echo "API int $name() { return 0; }" ;;
    esac
  done
}

library "$here/cudart.cpp" libcudart.so.13 -ldl
g++ -std=c++17 -O1 -w -shared -fPIC -fvisibility=hidden "${include[@]}" "$here/cuda.cpp" -L"$out" -l:libcudart.so.13 \
  -ldl -Wl,-soname,libcuda.so.1 -o "$out/libcuda.so.1"
ln -sf libcuda.so.1 "$out/libcuda.so"
(cat "$here/cublas.cpp" && missing "$here/cublas.cpp" 'cublas[^L]') >"$out/cublas.cpp"
library "$out/cublas.cpp" libcublas.so.13 -L"$out" -l:libcudart.so.13
(cat "$here/cublasLt.cpp" && missing "$here/cublasLt.cpp" cublasLt) >"$out/cublasLt.cpp"
library "$out/cublasLt.cpp" libcublasLt.so.13 -L"$out" -l:libcudart.so.13

# with COMMAND…: runs it with the null GPU. Without cuDNN's attention unless NULLGPU_CUDNN=1.
cat >"$out/with" <<R
#!/usr/bin/env bash
export NULLGPU=$out TRITON_LIBCUDA_PATH=$out CUDA_HOME=
export LD_PRELOAD="$out/libcudart.so.13 $out/libcuda.so.1 $out/libcublasLt.so.13 $out/libcublas.so.13"
[ -n "\${NULLGPU_CUDNN:-}" ] || export TORCH_CUDNN_SDPA_DEPRIORITIZED=1
exec "\$@"
R
chmod +x "$out/with"
