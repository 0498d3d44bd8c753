// What a young compiler would take from a young glibc or libstdc++, so that a library for a wheel
// asks for glibc 2.28 and GCC 8's libstdc++ only, as torch's own wheels do.
//
// The linker prefers these to the system's. `fusedshape.portable` finds whatever else is too young.
#include <ios>
#include <new>
#include <sstream>

#define LOCAL __attribute__((visibility("hidden")))

extern "C" {

// glibc 2.32. libstdc++ counts references without atomics while this is set; never is always right.
LOCAL char __libc_single_threaded = 0;

// glibc 2.29 has an exp that leaves errno to the caller.
double old_exp(double x);
__asm__(".symver old_exp, exp@GLIBC_2.2.5");
LOCAL double exp(double x) { return old_exp(x); }

// glibc 2.34 took dlsym over from libdl, which comes with libtorch_cpu. Headers of torch 2.14 call it.
void* old_dlsym(void* handle, const char* name);
__asm__(".symver old_dlsym, dlsym@GLIBC_2.2.5");
LOCAL void* dlsym(void* handle, const char* name) { return old_dlsym(handle, name); }

// GCC 9's constructors without arguments are the older ones with their default mode.
#define FS_STREAM "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEE"
#define FS_OSTREAM "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEE"
void old_stream(void* self, std::ios_base::openmode mode) __asm__(FS_STREAM
                                                                  "C1ESt13_Ios_Openmode");
void old_ostream(void* self, std::ios_base::openmode mode) __asm__(FS_OSTREAM
                                                                   "C1ESt13_Ios_Openmode");
LOCAL void new_stream(void* self) __asm__(FS_STREAM "C1Ev");
LOCAL void new_ostream(void* self) __asm__(FS_OSTREAM "C1Ev");
LOCAL void new_stream(void* self) { old_stream(self, std::ios_base::in | std::ios_base::out); }
LOCAL void new_ostream(void* self) { old_ostream(self, std::ios_base::out); }

}  // extern "C"

namespace std {

// GCC 11.
LOCAL void __throw_bad_array_new_length() { throw std::bad_array_new_length(); }

}  // namespace std
