// Hands kernels to torch's dispatcher through its stable interface, which calls them with a stack of 64-bit values.
#pragma once

#include <torch/csrc/stable/library.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/tensor.h"

namespace efe {

// What kernels take and give: its name in a schema, and how it is taken from the stack, which owns what it points to.
template <class T>
struct Boxed;

template <class T>
struct BoxedNumber {
    static T take(StableIValue value) { return stable::to<T>(value); }
};

template <>
struct Boxed<double> : BoxedNumber<double> {
    static std::string name() { return "float"; }
};

template <>
struct Boxed<int64_t> : BoxedNumber<int64_t> {
    static std::string name() { return "SymInt"; }
};

template <>
struct Boxed<bool> : BoxedNumber<bool> {
    static std::string name() { return "bool"; }
};

template <>
struct Boxed<std::string> {
    static std::string name() { return "str"; }
    static std::string take(StableIValue value) {
        const auto handle = stable::to<StringHandle>(value);
        size_t length;
        const char* data;
        check(torch_string_length(handle, &length));
        check(torch_string_c_str(handle, &data));
        std::string taken(data, length);
        check(torch_delete_string(handle));
        return taken;
    }
};

template <>
struct Boxed<Tensor> {
    static std::string name() { return "Tensor"; }
    static Tensor take(StableIValue value) { return Tensor(stable::to<AtenTensorHandle>(value)); }
    static StableIValue give(Tensor& tensor) { return stable::from(tensor.release()); }
};

template <class T>
struct Boxed<std::optional<T>> {
    static std::string name() { return Boxed<T>::name() + "?"; }
    static std::optional<T> take(StableIValue value) {
        const std::unique_ptr<StableIValue> inner(stable::to<StableIValue*>(value));
        return inner == nullptr ? std::nullopt : std::optional<T>(Boxed<T>::take(*inner));
    }
};

template <class T>
struct Boxed<std::vector<T>> {
    static std::string name() { return Boxed<T>::name() + "[]"; }
    static std::vector<T> take(StableIValue value) { return stable::to<std::vector<T>>(value); }
    static StableIValue give(std::vector<T>& values) {
        StableListHandle list;
        check(torch_new_list_reserve_size(values.size(), &list));
        for (T& value : values) check(torch_list_push_back(list, Boxed<T>::give(value)));
        return stable::from(list);
    }
};

// The schemas, without names, of the kernels that this extension holds: with them common/library.py finds out whether
// it was built from other sources. The dispatcher knows nothing of the types of such a kernel.
inline std::map<std::string, std::string>& schemas() {
    static std::map<std::string, std::string> all;
    return all;
}

template <class... Ts>
std::string names_of() {
    std::string names;
    ((names += (names.empty() ? "" : ", ") + Boxed<Ts>::name()), ...);
    return "(" + names + ")";
}

template <class T>
struct Results {
    static std::string name() { return Boxed<T>::name(); }
    static void give(T results, StableIValue* stack) { *stack = Boxed<T>::give(results); }
};

template <class... Ts>
struct Results<std::tuple<Ts...>> {
    static std::string name() { return names_of<Ts...>(); }
    static void give(std::tuple<Ts...> results, StableIValue* stack) {
        std::apply([&](Ts&... each) { ((*stack++ = Boxed<Ts>::give(each)), ...); }, results);
    }
};

template <auto function>
struct Kernel;

template <class Result, class... Args, Result (*function)(Args...)>
struct Kernel<function> {
    static std::string schema() { return names_of<std::decay_t<Args>...>() + " -> " + Results<Result>::name(); }
    static void call(StableIValue* stack, uint64_t, uint64_t) { call(stack, std::index_sequence_for<Args...>()); }

private:
    template <size_t... place>
    static void call(StableIValue* stack, std::index_sequence<place...>) {
        const std::tuple<std::decay_t<Args>...> arguments{Boxed<std::decay_t<Args>>::take(stack[place])...};
        Results<Result>::give(std::apply(function, arguments), stack);
    }
};

using Library = stable::StableLibrary;

template <auto function>
void implement(Library& library, const char* name) {
    schemas()[name] = Kernel<function>::schema();
    library.impl(name, Kernel<function>::call);
}

}  // namespace efe
