// What this project uses of DLPack's C exchange interface (https://dmlc.github.io/dlpack, version 1): how to see a
// tensor's memory without a Python object for each of its properties. Layouts are the standard's.
#pragma once
#include <cstdint>

namespace sk::dlpack {

constexpr std::uint32_t kMajor = 1, kMinor = 2;  // at least
constexpr const char* kCapsule = "dlpack_exchange_api";

struct Device {
  std::int32_t type, id;
  bool operator==(const Device& o) const { return type == o.type && id == o.id; }
};

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
  bool operator==(const DataType& o) const { return code == o.code && bits == o.bits && lanes == o.lanes; }
};

struct Tensor {  // DLTensor
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

struct Exchange {  // DLPackExchangeAPI
  std::uint32_t major, minor;
  void* previous;
  // Allocation, and conversions to and from owning tensors.
  void (*unused[3])();
  // The memory of a tensor object, valid as long as it and its shape live. Not 0: a Python exception is set. May be null.
  int (*view)(void* object, Tensor* out);
};

}  // namespace sk::dlpack
