// The Python module fastpo._cuda. Importing it registers the CUDA ops with torch; it has no functions of its own.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda(void) {
  static struct PyModuleDef def = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&def);
}
