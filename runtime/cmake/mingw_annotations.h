/* Annotations of Microsoft's compiler that the header of ONNX Runtime uses on Windows. */
#include <specstrings.h>
#ifndef _Return_type_success_
#define _Return_type_success_(condition)
#endif
#ifndef _Frees_ptr_opt_
#define _Frees_ptr_opt_
#endif
#ifndef _stdcall
#define _stdcall __stdcall
#endif
