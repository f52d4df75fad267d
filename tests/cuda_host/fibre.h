// Stacks to switch between. On x86-64 a dozen instructions do this; swapcontext() takes far longer, since it saves the
// signal mask by a system call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__) || defined(RLRR_UCONTEXT)
#include <ucontext.h>
#endif

namespace rlrr::model {

constexpr std::size_t kStackBytes = 128 * 1024;

#if defined(__x86_64__) && !defined(RLRR_UCONTEXT)

extern "C" void rlrr_switch(void** save, void* load);
asm(R"(
.text
.globl rlrr_switch
.hidden rlrr_switch
.type rlrr_switch, @function
rlrr_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rlrr_switch, .-rlrr_switch
)");

class Fibre {
 public:
  // Call `entry`, which must never return, at the next switch to this fibre.
  void start(void (*entry)()) {
    if (!stack_) stack_.reset(new char[kStackBytes]);
    auto top = (reinterpret_cast<uintptr_t>(stack_.get()) + kStackBytes) & ~uintptr_t{15};
    auto* words = reinterpret_cast<void**>(top);
    *--words = nullptr;  // where a return address would be: the stack is aligned as after a call
    *--words = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--words = nullptr;
    pointer_ = words;
  }
  static void swap(Fibre& from, Fibre& to) { rlrr_switch(&from.pointer_, to.pointer_); }

 private:
  std::unique_ptr<char[]> stack_;
  void* pointer_ = nullptr;
};

#else

class Fibre {
 public:
  void start(void (*entry)()) {
    if (!stack_) stack_.reset(new char[kStackBytes]);
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void swap(Fibre& from, Fibre& to) { swapcontext(&from.context_, &to.context_); }

 private:
  std::unique_ptr<char[]> stack_;
  ucontext_t context_;
};

#endif

}  // namespace rlrr::model
