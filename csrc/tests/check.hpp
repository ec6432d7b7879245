// A test is a sentence and a body: TEST("a miss never evicts a held expert") { CHECK_EQ(1 + 1, 2); }
// One file with EMOE_TEST_MAIN per executable; prints "N passed, N failed" and returns nonzero when one failed. Its
// argument is part of a sentence, or a share such as 1/2: every second test from the first on.
#pragma once

#include <exception>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/error.hpp"

namespace emoe::test {

struct Case {
    const char* name;
    void (*run)();
};

inline std::vector<Case>& cases() {
    static std::vector<Case> all;
    return all;
}

struct Register {
    Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
    throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

template <typename A, typename B>
void check_eq(const A& a, const B& b, const char* text, const char* file, int line) {
    if (a == b) return;
    std::ostringstream message;
    message << text << " (" << a << " and " << b << ")";
    fail(file, line, message.str());
}

// Runs fn and returns the emoe::Error it throws; anything else fails the test.
template <typename Fn>
Error error_of(Fn&& fn, const char* file, int line) {
    try {
        fn();
    } catch (const Error& error) {
        return error;
    }
    fail(file, line, "no emoe::Error was thrown");
}

inline bool is_chosen(const std::string& argument, std::size_t number, const std::string& sentence) {
    if (argument.size() == 3 && argument[1] == '/') {
        const auto parts = static_cast<std::size_t>(argument[2] - '0');
        return number % parts + 1 == static_cast<std::size_t>(argument[0] - '0');
    }
    return sentence.find(argument) != std::string::npos;
}

inline int run_all(const std::string& argument) {
    int passed = 0;
    int failed = 0;
    for (std::size_t number = 0; number < cases().size(); ++number) {
        const Case& item = cases()[number];
        if (!is_chosen(argument, number, item.name)) continue;
        try {
            item.run();
            ++passed;
        } catch (const std::exception& error) {
            ++failed;
            std::cout << "FAILED " << item.name << "\n       " << error.what() << std::endl;
        }
    }
    std::cout << passed << " passed, " << failed << " failed" << std::endl;
    return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace emoe::test

#define EMOE_JOIN2(a, b) a##b
#define EMOE_JOIN(a, b) EMOE_JOIN2(a, b)
#define TEST(sentence)                                                                                        \
    static void EMOE_JOIN(test_, __LINE__)();                                                                 \
    static const ::emoe::test::Register EMOE_JOIN(register_, __LINE__)(sentence, EMOE_JOIN(test_, __LINE__)); \
    static void EMOE_JOIN(test_, __LINE__)()
#define CHECK(condition) ((condition) ? void() : ::emoe::test::fail(__FILE__, __LINE__, "not true: " #condition))
#define CHECK_EQ(a, b) ::emoe::test::check_eq((a), (b), #a " != " #b, __FILE__, __LINE__)
#define ERROR_OF(expression) ::emoe::test::error_of([&] { expression; }, __FILE__, __LINE__)
#define CHECK_ERROR(error_kind, expression) \
    CHECK_EQ(static_cast<int>(ERROR_OF(expression).kind), static_cast<int>(error_kind))
#define EMOE_TEST_MAIN \
    int main(int argc, char** argv) { return ::emoe::test::run_all(argc > 1 ? argv[1] : ""); }
