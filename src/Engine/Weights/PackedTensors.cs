using System.Numerics;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Quantised;

namespace MiniCpmNative.Engine.Weights;

/// <summary>
/// Finds the matrices that a checkpoint holds quantised, and puts one tensor in the place of the
/// several that each is stored in.
/// </summary>
internal sealed class PackedTensors
{
    private const string State = ".quant_state.bitsandbytes__", Words = ".qweight", Scb = ".SCB";

    private readonly string _directory;
    private readonly Dictionary<string, StoredTensor> _stored;
    private readonly HashSet<string> _parts = new(StringComparer.Ordinal);
    private readonly Dictionary<string, PackedTensor> _found = new(StringComparer.Ordinal);
    private JsonValue? _config;

    private PackedTensors(string directory, Dictionary<string, StoredTensor> stored) =>
        (_directory, _stored) = (directory, stored);

    /// <exception cref="InputException">Parts are missing, or do not fit together.</exception>
    public static void Fold(string directory, Dictionary<string, StoredTensor> tensors)
    {
        var packed = new PackedTensors(directory, tensors);
        foreach (StoredTensor tensor in tensors.Values)
        {
            string name = tensor.Name;
            int state = name.IndexOf(State, StringComparison.Ordinal);
            if (state > 0) packed.FourBit(name[..state], tensor);
            else if (name.EndsWith(Scb, StringComparison.Ordinal))
                packed.Int8(name[..^Scb.Length], tensor);
            else if (name.EndsWith(Words, StringComparison.Ordinal))
                packed.Grouped(name[..^Words.Length], tensor);
        }

        if (packed._found.Count == 0) return;
        StoredTensor[] all = [.. tensors.Values];
        tensors.Clear();
        foreach (StoredTensor tensor in all)
        {
            if (packed._found.TryGetValue(tensor.Name, out PackedTensor? whole))
                tensors.Add(whole.Name, whole);
            else if (!packed._parts.Contains(tensor.Name)) tensors.Add(tensor.Name, tensor);
        }
    }

    private void FourBit(string name, StoredTensor tensor)
    {
        if (tensor.Bytes > 1 << 16)
            throw new InputException($"{tensor.Place} has {tensor.Bytes:N0} bytes, "
                + "expected a few hundred of JSON");
        JsonValue state = JsonInput.Parse(tensor.Place, tensor.Span.ToArray());
        _parts.Add(tensor.Name);
        JsonValue[] shape = [.. state["shape"].Items()];
        if (shape.Length != 2) throw state["shape"].Expected("two sizes");
        bool nested = state.Find("nested_offset") is not null;
        var form = new FourBitForm(shape[0].Int(1), shape[1].Int(1), Block(state["blocksize"]),
            nested ? Block(state["nested_blocksize"]) : 0);
        StoredTensor codes = Part(name, "");
        long bytes = (form.Count + 1) / 2, size = codes.StoredType.Size;
        // Some are stored as elements of wider types.
        if (bytes > int.MaxValue || codes.Bytes != (bytes + size - 1) / size * size)
            throw new InputException($"{codes.Place} has {codes.Bytes:N0} bytes, expected the "
                + $"{bytes:N0} of 4-bit codes of [{form.Outputs}, {form.Inputs}]");
        StoredTensor scales = Part(name, ".absmax", form.Blocks, isFloat: !nested);
        StoredTensor? largest = nested ? Part(name, ".nested_absmax", form.Scales) : null;
        Add(codes, new FourBitTensor(form, name, codes, Part(name, ".quant_map", 16), scales,
            largest, nested ? Part(name, ".nested_quant_map", 256) : null,
            nested ? (float)state["nested_offset"].Number(float.MinValue, float.MaxValue) : 0));
    }

    private static int Block(JsonValue value)
    {
        int block = value.Int(32, FourBitForm.MostInBlock);
        return BitOperations.IsPow2(block) ? block : throw value.Expected("a power of two");
    }

    private void Int8(string module, StoredTensor scales)
    {
        string name = module + ".weight";
        StoredTensor elements = Part(name, "");
        if (elements.StoredType.Name != "I8" || elements.Sizes.Length != 2)
            throw new InputException($"{elements.Place} is {elements.StoredType.Name} "
                + $"{elements.SizesText}, expected a matrix of I8 beside {scales.Name}");
        // Checked as kernels take it, that of the outputs.
        Part(module, Scb, elements.Shape[0]);
        if (_stored.GetValueOrDefault(module + ".weight_format") is { } format)
        {
            _parts.Add(format.Name);
            if (format.Bytes != 1 || format.Span[0] != 0)
                throw new InputException($"{format.Place} is not 0 (row-major): the layouts of "
                    + "bitsandbytes before 0.43 are not read; save the model again with a newer "
                    + "one");
        }

        Add(elements, new Int8Tensor(name, elements, scales));
    }

    private void Grouped(string module, StoredTensor words)
    {
        JsonValue config = Config(words);
        string method = config["quant_method"].Text();
        bool awq = method == "awq";
        if (!awq && method != "gptq")
            throw config["quant_method"].Expected($"awq or gptq, as {words.Name} is there");
        int bits = config["bits"].Int();
        if (bits != 4 && (awq || bits != 8)) throw config["bits"].Expected(awq ? "4" : "4 or 8");
        string format = (awq ? config.Find("version")
            : config.Find("checkpoint_format") ?? config.Find("format"))?.Text().ToLowerInvariant()
            ?? (awq ? "gemm" : "gptq");
        if (format is not ("gptq" or "gptq_v2") && !awq || awq && format != "gemm")
            throw config[awq ? "version" : "checkpoint_format"].Expected(
                awq ? "gemm" : "gptq or gptq_v2");
        StoredTensor scales = Part(module, ".scales");
        int fields = 32 / bits;
        if (words.Sizes.Length != 2 || scales.Sizes.Length != 2 || words.StoredType.Name != "I32"
            || words.Sizes[0] * (double)fields > int.MaxValue)
            throw new InputException($"{words.Place} is {words.StoredType.Name} {words.SizesText} "
                + $"beside scales {scales.SizesText}, expected matrices, and words of I32");
        int outputs = scales.Shape[1], inputs = words.Shape[0] * (awq ? 1 : fields);
        int size = config["group_size"].Int(-1);
        bool isOrdered = _stored.ContainsKey(module + ".g_idx");
        var form = new GroupedForm(
            outputs, inputs, bits, size > 0 ? size : Math.Max(1, inputs), isOrdered);
        if (outputs % fields != 0
            || words.Count * fields != (long)outputs * inputs)
            throw new InputException($"{words.Place} has shape {words.SizesText}, expected "
                + $"{(awq ? $"[inputs, {outputs} / {fields}]" : $"[inputs / {fields}, {outputs}]")}");
        Part(module, ".scales", form.Groups * (long)outputs);
        StoredTensor zeros =
            Part(module, ".qzeros", form.Groups * (long)outputs / fields, isWords: true);
        StoredTensor? groups = isOrdered ? Part(module, ".g_idx", inputs, isWords: true) : null;
        _parts.Add(words.Name);
        Add(words, new GroupedTensor(
            form, awq, format == "gptq", module + ".weight", words, zeros, scales, groups));
    }

    // In the place of its main part.
    private void Add(StoredTensor main, PackedTensor whole)
    {
        if (!_found.TryAdd(main.Name, whole)
            || (whole.Name != main.Name && _stored.ContainsKey(whole.Name)))
            throw new InputException($"{main.Place} is there in two forms");
    }

    private JsonValue Config(StoredTensor words) => _config ??=
        JsonInput.ReadObject(Path.Combine(_directory, "config.json")).Find("quantization_config")
        ?? throw new InputException($"{words.Place} is quantised, and "
            + $"{Path.Combine(_directory, "config.json")} has no quantization_config");

    // A tensor beside the others, with so many elements of its kind where that is given.
    private StoredTensor Part(
        string name, string suffix, long count = -1, bool isFloat = true, bool isWords = false)
    {
        StoredTensor part = _stored.GetValueOrDefault(name + suffix) ?? throw new InputException(
            $"{_directory}: {Messages.Quote(name)} is quantised, and "
            + $"{Messages.Quote(name + suffix)} is missing");
        _parts.Add(part.Name);
        if (count < 0) return part;
        bool fits = isWords ? part.StoredType.Name == "I32"
            : isFloat ? part.StoredType.Kernel?.IsFloat() == true : part.StoredType.Name == "U8";
        return fits && part.Count == count ? part : throw new InputException(
            $"{part.Place} is {part.StoredType.Name} {part.SizesText}, expected {count:N0} "
            + $"elements of {(isWords ? "I32" : isFloat ? "F32" : "U8")}");
    }
}
