using System.Text;
using System.Text.RegularExpressions;

namespace MiniCpmNative.Kernels.Cuda;

/// <summary>What a kernel's parameter takes.</summary>
public enum ParameterKind : byte
{
    Pointer, Int32, Int64, Float32, Float64,
}

/// <summary>
/// One parameter. Element is the pointed-to type, null where it does not say (void, vector types);
/// IsReal marks the module's storage type.
/// </summary>
public sealed record KernelParameter(string Name, ParameterKind Kind, DType? Element, bool IsReal)
{
    public int Bytes => Kind is ParameterKind.Int32 or ParameterKind.Float32 ? 4 : 8;
}

/// <summary>A kernel's name and parameters; <see cref="Offsets"/> are those of its argument
/// buffer.</summary>
public sealed record KernelSignature(string Name, KernelParameter[] Parameters)
{
    public int[] Offsets { get; } = Layout(Parameters);
    public int ArgumentBytes => Parameters.Length == 0 ? 0 : Offsets[^1] + Parameters[^1].Bytes;

    private static int[] Layout(KernelParameter[] parameters)
    {
        var offsets = new int[parameters.Length];
        int at = 0;
        for (int n = 0; n < parameters.Length; n++)
        {
            int bytes = parameters[n].Bytes;
            at = (at + bytes - 1) / bytes * bytes;
            offsets[n] = at;
            at += bytes;
        }
        return offsets;
    }
}

/// <summary>
/// Reads the extern "C" __global__ signatures of a CUDA source, so that every launch can be checked
/// against them. Knows the built-in types, the source's own typedefs, and "real", the storage type.
/// </summary>
public static partial class KernelSignatures
{
    /// <exception cref="CudaException">A parameter's type is not known; names kernel and
    /// parameter.</exception>
    public static IReadOnlyDictionary<string, KernelSignature> Parse(string source, DType storage)
    {
        string text = Comment().Replace(OfStorage(source, storage), " ");
        var aliases = new Dictionary<string, string>();
        foreach (Match m in Typedef().Matches(text))
            aliases[m.Groups[2].Value] = Words(m.Groups[1].Value);
        var found = new Dictionary<string, KernelSignature>();
        foreach (Match m in Kernel().Matches(text))
        {
            string name = m.Groups[1].Value;
            string list = m.Groups[2].Value.Trim();
            var parameters = list.Length == 0 || list == "void"
                ? []
                : Array.ConvertAll(list.Split(','), p => Parameter(name, p, aliases, storage));
            found[name] = new(name, parameters);
        }
        return found;
    }

    // The source without the lines of other storage types: those between #if (or #elif) conditions
    // of defined(STORAGE_...) that do not hold. Other conditions keep all their lines.
    private static string OfStorage(string source, DType storage)
    {
        var kept = new StringBuilder(source.Length);
        // Per open #if: whether its lines count now, and whether one of its branches did before.
        var open = new Stack<(bool Counts, bool Before)>();
        foreach (string line in source.Split('\n'))
        {
            string trimmed = line.TrimStart();
            if (trimmed.StartsWith("#if", StringComparison.Ordinal))
            {
                bool holds = Holds(trimmed, storage);
                open.Push((holds, holds));
            }
            else if (trimmed.StartsWith("#el", StringComparison.Ordinal)
                && open.TryPop(out var state))
            {
                bool holds = !state.Before && Holds(trimmed, storage);
                open.Push((holds, state.Before || holds));
            }
            else if (trimmed.StartsWith("#endif", StringComparison.Ordinal))
            {
                open.TryPop(out _);
            }
            else if (open.All(condition => condition.Counts))
            {
                kept.Append(line).Append('\n');
            }
        }

        return kept.ToString();
    }

    private static bool Holds(string condition, DType storage) =>
        !condition.Contains("defined(STORAGE_", StringComparison.Ordinal)
        || condition.Contains($"defined(STORAGE_{storage})", StringComparison.Ordinal);

    private static KernelParameter Parameter(
        string kernel, string text, Dictionary<string, string> aliases, DType storage)
    {
        bool pointer = text.Contains('*');
        string[] words = Words(text.Replace('*', ' '))
            .Split(' ', StringSplitOptions.RemoveEmptyEntries);
        string name = words[^1], type = string.Join(' ', words[..^1]);
        bool real = type == "real";
        while (!real && aliases.TryGetValue(type, out string? meaning))
            (type, real) = (meaning, meaning == "real");
        if (pointer) return new(name, ParameterKind.Pointer, real ? storage : Element(type), real);
        ParameterKind kind = type switch
        {
            "int" or "unsigned" or "unsigned int" or "signed int" or "bool" => ParameterKind.Int32,
            "long long" or "unsigned long long" or "long long int" or "unsigned long" or "long"
                or "size_t" =>
                ParameterKind.Int64,
            "float" => ParameterKind.Float32,
            "double" => ParameterKind.Float64,
            _ => throw new CudaException(
                $"kernel {kernel}: type \"{type}\" of parameter {name} is not known"),
        };
        return kind == ParameterKind.Int32 && type == "bool"
            ? throw new CudaException(
            $"kernel {kernel}: pass {name} as int: bool has no fixed size")
            : new(name, kind, null, false);
    }

    private static DType? Element(string type) => type switch
    {
        "float" => DType.F32,
        "double" => DType.F64,
        "bf16" => DType.BF16,
        "half" or "f16" => DType.F16,
        "int" or "unsigned" or "unsigned int" => DType.I32,
        "unsigned char" or "signed char" or "char" => DType.U8,
        "long long" or "unsigned long long" => DType.I64,
        _ => null,
    };

    // The type's words in one spelling: qualifiers go, blanks are single.
    private static string Words(string text)
    {
        var words = new StringBuilder();
        foreach (string word in text.Split((char[])[' ', '\t', '\n', '\r'],
            StringSplitOptions.RemoveEmptyEntries))
            if (word is not ("const" or "volatile" or "__restrict__" or "struct"))
                words.Append(words.Length > 0 ? " " : "").Append(word);
        return words.ToString();
    }

    [GeneratedRegex(@"//[^\n]*|/\*.*?\*/", RegexOptions.Singleline)]
    private static partial Regex Comment();

    // The 16-bit storage formats are one C type; their typedef's own name tells them apart.
    [GeneratedRegex(@"typedef\s+([\w\s]+?)\s+(?!bf16\b|half\b|f16\b|real\b)(\w+)\s*;")]
    private static partial Regex Typedef();

    [GeneratedRegex(
        @"extern\s+""C""\s+__global__\s+(?:void\s+)?(?:__launch_bounds__\s*\([^)]*\)\s*)?(?:void\s+)?(\w+)\s*\(([^)]*)\)")]
    private static partial Regex Kernel();
}
