// A test framework in one page: CHECK ends the program with the place, the values and the case at hand.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

namespace tandem {

// What is being checked, named by the innermost loop of a test; printed when a check fails.
inline std::string& current_case() {
  static std::string name;
  return name;
}

struct Failure {
  const char* file;
  int line;
  const char* condition;

  template <class... Values>
  [[noreturn]] void with(const Values&... values) const {
    std::ostringstream text;
    ((text << "  " << values), ...);
    std::fprintf(stderr, "%s:%d: failed: %s%s\n  in %s\n", file, line, condition, text.str().c_str(),
                 current_case().c_str());
    std::abort();
  }
};

// CHECK(condition, values...): the values are printed where the condition does not hold.
#define CHECK(condition, ...)                                                              \
  do {                                                                                     \
    if (!(condition)) ::tandem::Failure{__FILE__, __LINE__, #condition}.with(__VA_ARGS__); \
  } while (false)

struct Test {
  const char* name;
  void (*run)();
};

// Runs the tests whose name contains the first argument, or all of them; fails where there is none.
inline int run_tests(const std::vector<Test>& tests, int argc, char** argv) {
  int num_run = 0;
  for (const Test& test : tests) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    current_case() = test.name;
    test.run();
    std::printf("passed: %s\n", test.name);
    std::fflush(stdout);
    ++num_run;
  }
  return num_run > 0 ? 0 : 1;
}

}  // namespace tandem
