// In front of a C++ solution whose function is called: reads a call's arguments as JSON by the types of
// the function, calls it, writes the value. Lines over descriptor 0: `id [args]` in, JSON out.
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iostream>
#include <list>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <queue>
#include <set>
#include <sstream>
#include <stack>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>
#if __cplusplus > 201703L
#include <span>
#endif
#include <fcntl.h>
#include <unistd.h>

namespace r1fast_candidate {

struct Reader {
    const char* at;
    void skip() { while (*at == ' ') ++at; }
    bool take(char c) { skip(); if (*at != c) return false; ++at; return true; }
    void need(char c) { if (!take(c)) fail(); }
    [[noreturn]] static void fail() { throw std::invalid_argument("an argument is not of the parameter's type"); }
};

inline void put_utf8(std::string& out, unsigned c) {
    if (c < 0x80) out += char(c);
    else if (c < 0x800) { out += char(0xC0 | c >> 6); out += char(0x80 | (c & 63)); }
    else if (c < 0x10000) { out += char(0xE0 | c >> 12); out += char(0x80 | (c >> 6 & 63)); out += char(0x80 | (c & 63)); }
    else { out += char(0xF0 | c >> 18); out += char(0x80 | (c >> 12 & 63)); out += char(0x80 | (c >> 6 & 63)); out += char(0x80 | (c & 63)); }
}

inline unsigned read_hex(Reader& r) {
    unsigned c = 0;
    for (int i = 0; i < 4; ++i) {
        char h = *r.at++;
        if (!isxdigit((unsigned char)h)) Reader::fail();
        c = c * 16 + unsigned(h <= '9' ? h - '0' : (h | 32) - 'a' + 10);
    }
    return c;
}

inline void read(Reader& r, std::string& v) {
    v.clear();
    r.need('"');
    while (*r.at != '"') {
        if (!*r.at) Reader::fail();
        if (*r.at != '\\') { v += *r.at++; continue; }
        ++r.at;
        char c = *r.at++;
        switch (c) {
            case 'n': v += '\n'; break;
            case 't': v += '\t'; break;
            case 'r': v += '\r'; break;
            case 'b': v += '\b'; break;
            case 'f': v += '\f'; break;
            case 'u': {
                unsigned u = read_hex(r);
                if (u >= 0xD800 && u < 0xDC00 && r.at[0] == '\\' && r.at[1] == 'u') {
                    r.at += 2;
                    u = 0x10000 + ((u - 0xD800) << 10) + (read_hex(r) - 0xDC00);
                }
                put_utf8(v, u);
                break;
            }
            default: v += c;
        }
    }
    ++r.at;
}

inline void read(Reader& r, bool& v) {
    r.skip();
    if (!std::strncmp(r.at, "true", 4)) { v = true; r.at += 4; }
    else if (!std::strncmp(r.at, "false", 5)) { v = false; r.at += 5; }
    else Reader::fail();
}

inline void read(Reader& r, char& v) {
    std::string s;
    read(r, s);
    if (s.size() != 1) Reader::fail();
    v = s[0];
}

template <class T> std::enable_if_t<std::is_arithmetic_v<T>> read(Reader& r, T& v) {
    r.skip();
    char* end = nullptr;
    if constexpr (std::is_floating_point_v<T>) v = T(std::strtold(r.at, &end));
    else if constexpr (std::is_signed_v<T>) {
        long long whole = std::strtoll(r.at, &end, 10);
        if (whole < (long long)std::numeric_limits<T>::min() || whole > (long long)std::numeric_limits<T>::max()) Reader::fail();
        v = T(whole);
    } else v = T(std::strtoull(r.at, &end, 10));
    if (end == r.at || (std::is_integral_v<T> && (*end == '.' || *end == 'e'))) Reader::fail();
    r.at = end;
}

template <class A, class B> void read(Reader& r, std::pair<A, B>& v);
template <class... T> void read(Reader& r, std::tuple<T...>& v);
template <class T> void read(Reader& r, std::optional<T>& v);
template <class C> auto read(Reader& r, C& v) -> std::enable_if_t<!std::is_arithmetic_v<C>, decltype(v.begin(), void(v.end()))>;

template <class T> struct Element { using type = T; };  // the keys of a map are const in it
template <class A, class B> struct Element<std::pair<const A, B>> { using type = std::pair<A, B>; };

// with one value for a key: map, unordered_map
template <class C, class = void> struct IsMap : std::false_type {};
template <class C> struct IsMap<C, std::void_t<typename C::mapped_type, decltype(std::declval<C&>().at(std::declval<const typename C::key_type&>()))>> : std::true_type {};

template <class K> void read_key(Reader& r, K& v) {
    r.skip();
    // the keys of a JSON object are strings
    bool quoted = std::is_arithmetic_v<K> && !std::is_same_v<K, char> && r.take('"');
    read(r, v);
    if (quoted) r.need('"');
}

template <class C> auto read(Reader& r, C& v) -> std::enable_if_t<!std::is_arithmetic_v<C>, decltype(v.begin(), void(v.end()))> {
    v.clear();
    r.need('[');
    if (r.take(']')) return;
    do {
        typename Element<typename C::value_type>::type item{};
        if constexpr (IsMap<C>::value) { r.need('['); read_key(r, item.first); r.need(','); read(r, item.second); r.need(']'); }
        else read(r, item);
        v.insert(v.end(), std::move(item));
    } while (r.take(','));
    r.need(']');
}

template <class A, class B> void read(Reader& r, std::pair<A, B>& v) {
    r.need('['); read(r, v.first); r.need(','); read(r, v.second); r.need(']');
}

template <class... T> void read(Reader& r, std::tuple<T...>& v) {
    r.need('[');
    bool first = true;
    std::apply([&](auto&... item) { ((first ? void(first = false) : r.need(','), read(r, item)), ...); }, v);
    r.need(']');
}

template <class T> void read(Reader& r, std::optional<T>& v) {
    r.skip();
    if (!std::strncmp(r.at, "null", 4)) { v.reset(); r.at += 4; return; }
    v.emplace();
    read(r, *v);
}

inline void write(std::string& out, bool v) { out += v ? "true" : "false"; }
inline void write(std::string& out, const std::string& v) {
    out += '"';
    for (unsigned char c : v) {
        if (c == '"' || c == '\\') { out += '\\'; out += char(c); }
        else if (c < 32) { char hex[8]; std::snprintf(hex, sizeof hex, "\\u%04x", c); out += hex; }
        else out += char(c);
    }
    out += '"';
}
inline void write(std::string& out, const char* v) { write(out, std::string(v)); }
inline void write(std::string& out, std::string_view v) { write(out, std::string(v)); }
inline void write(std::string& out, char v) { write(out, std::string(1, v)); }

template <class T> std::enable_if_t<std::is_arithmetic_v<T>> write(std::string& out, T v) {
    if constexpr (std::is_floating_point_v<T>) {
        if (std::isnan(v)) { out += "{\"f\":\"nan\"}"; return; }
        if (std::isinf(v)) { out += v > 0 ? "{\"f\":\"inf\"}" : "{\"f\":\"-inf\"}"; return; }
        char text[64];
        std::snprintf(text, sizeof text, "%.17g", double(v));
        out += text;
        if (!std::strpbrk(text, ".e")) out += ".0";
    } else out += std::to_string(v);
}

template <class A, class B> void write(std::string& out, const std::pair<A, B>& v);
template <class... T> void write(std::string& out, const std::tuple<T...>& v);
template <class T> void write(std::string& out, const std::optional<T>& v) {
    if (v) write(out, *v);
    else out += "null";
}
template <class C> auto write(std::string& out, const C& v) -> std::enable_if_t<!std::is_arithmetic_v<C>, decltype(v.begin(), void(v.end()))> {
    out += IsMap<C>::value ? "{\"d\":[" : "[";
    bool first = true;
    for (const auto& item : v) {
        if (!first) out += ',';
        first = false;
        if constexpr (IsMap<C>::value) {
            out += "{\"t\":"; write(out, item); out += '}';
        } else write(out, std::remove_cv_t<typename C::value_type>(item));
    }
    out += IsMap<C>::value ? "]}" : "]";
}
template <class A, class B> void write(std::string& out, const std::pair<A, B>& v) {
    out += '['; write(out, v.first); out += ','; write(out, v.second); out += ']';
}
template <class... T> void write(std::string& out, const std::tuple<T...>& v) {
    out += '[';
    bool first = true;
    std::apply([&](const auto&... item) { ((first ? void(first = false) : void(out += ','), write(out, item)), ...); }, v);
    out += ']';
}

// What holds an argument of a parameter's type: views need something to look at.
template <class T> struct Stored { using type = T; };
template <> struct Stored<std::string_view> { using type = std::string; };
template <> struct Stored<const char*> { using type = std::string; };
#if __cplusplus > 201703L
template <class T> struct Stored<std::span<T>> { using type = std::vector<std::remove_cv_t<T>>; };
#endif

template <class A, class S> decltype(auto) given(S& arg) {
    if constexpr (std::is_same_v<std::decay_t<A>, const char*>) return arg.c_str();
    else if constexpr (std::is_rvalue_reference_v<A>) return std::move(arg);
    else return (arg);
}

template <class Call, class R, class... A> std::string answer(Call call, const char* text, int result_from) {
    std::tuple<typename Stored<std::decay_t<A>>::type...> args;
    Reader reader{text};
    read(reader, args);
    std::string out;
    auto run = [&](auto&... item) -> R { return call(given<A>(item)...); };
    if constexpr (std::is_void_v<R>) std::apply(run, args);
    else {
        R value = std::apply(run, args);
        if (result_from < 0) write(out, static_cast<const std::decay_t<R>&>(value));
    }
    if (result_from >= 0) {
        int at = 0;
        std::apply([&](auto&... item) { ((at++ == result_from ? write(out, static_cast<const std::decay_t<decltype(item)>&>(item)) : void()), ...); }, args);
    }
    return out.empty() ? "null" : out;
}

template <class F> int serve(F f) {
    int control = ::dup(0), null = ::open("/dev/null", O_RDWR);
    for (int standard = 0; standard < 3; ++standard) ::dup2(null, standard);
    FILE* lines = ::fdopen(control, "r");
    char* line = nullptr;
    size_t room = 0;
    while (::getline(&line, &room, lines) > 0) {
        char* text = nullptr;
        long id = std::strtol(line, &text, 10), from = std::strtol(text, &text, 10);
        std::string reply = "{\"id\":" + std::to_string(id) + ",";
        try {
            reply += "\"value\":" + f(text, int(from));
        } catch (const std::exception& error) {
            std::string what;
            write(what, std::string(error.what()).substr(0, 300));
            reply += "\"raised\":\"RuntimeError\",\"text\":" + what;
        } catch (...) {
            reply += "\"raised\":\"RuntimeError\",\"text\":\"an exception\"";
        }
        reply += "}\n";
        for (size_t done = 0; done < reply.size();) {
            ssize_t n = ::write(control, reply.data() + done, reply.size() - done);
            if (n <= 0) return 1;
            done += size_t(n);
        }
    }
    return 0;
}

template <class R, class... A> int serve_calls(R (*f)(A...)) {
    return serve([f](const char* text, int from) { return answer<R (*)(A...), R, A...>(f, text, from); });
}
template <class C, class R, class... A> int serve_calls(R (C::*f)(A...)) {
    return serve([f](const char* text, int from) {
        auto object = std::make_unique<C>();
        auto call = [&](auto&&... args) -> R { return ((*object).*f)(std::forward<decltype(args)>(args)...); };
        return answer<decltype(call), R, A...>(call, text, from);
    });
}
template <class C, class R, class... A> int serve_calls(R (C::*f)(A...) const) {
    return serve([f](const char* text, int from) {
        auto object = std::make_unique<C>();
        auto call = [&](auto&&... args) -> R { return ((*object).*f)(std::forward<decltype(args)>(args)...); };
        return answer<decltype(call), R, A...>(call, text, from);
    });
}

// An object that can be called: a lambda, a std::function.
template <class F, class R, class... A> int serve_object(F* f, R (F::*)(A...) const) {
    return serve([f](const char* text, int from) { return answer<F&, R, A...>(*f, text, from); });
}
template <class F, class R, class... A> int serve_object(F* f, R (F::*)(A...)) {
    return serve([f](const char* text, int from) { return answer<F&, R, A...>(*f, text, from); });
}
template <class F> auto serve_calls(F* f) -> decltype(serve_object(f, &F::operator())) {
    return serve_object(f, &F::operator());
}

// Whatever takes arguments of these types: an overloaded function, a template.
template <class... A, class Call> int serve_typed(Call call) {
    using R = decltype(call(std::declval<A&>()...));
    return serve([call](const char* text, int from) { return answer<Call, R, A&...>(call, text, from); });
}

}  // namespace r1fast_candidate
#define main candidates_own_main
