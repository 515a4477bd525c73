using System.Globalization;

namespace MiniCpmNative.GpuEmulator.Ptx;

/// <summary>
/// Reads the PTX that NVRTC 11.8 to 13 and clang write: module variables, kernels, registers with
/// nested scopes, labels, .loc lines. Functions and calls are refused: kernels.cu inlines
/// everything.
/// </summary>
public sealed class PtxParser
{
    private readonly List<Token> _tokens;
    private readonly Dictionary<int, string> _files = [];
    private readonly PtxModule _module;
    private readonly List<(int File, int Line, int InlinedAt, PtxKernel Kernel,
        int At)> _locations = [];
    private int _at;

    private PtxParser(string text)
    {
        _tokens = PtxLexer.Split(text);
        Expect(".version");
        string version = Next().Text;
        Expect(".target");
        string target = Next().Text;
        _module = new(version, target);
    }

    /// <exception cref="PtxException">Names the line and what is wrong with it.</exception>
    public static PtxModule Parse(string text)
    {
        var parser = new PtxParser(text);
        parser.ReadModule();
        parser.NameFiles();
        return parser._module;
    }

    private void ReadModule()
    {
        while (_at < _tokens.Count)
        {
            var token = Next();
            switch (token.Text)
            {
                case "," or "debug" or "texmode_independent": break;
                case ".address_size":
                    if (Next().Text != "64") throw Error(token, "only .address_size 64 is known");
                    break;
                case ".file": ReadFile(); break;
                case ".section": SkipBlock(); break;
                case ".visible" or ".weak" or ".common": break;
                case ".extern": ReadVariable(_module.Variables, isExtern: true); break;
                case ".global" or ".const" or ".shared":
                    _at--;
                    ReadVariable(_module.Variables, isExtern: false);
                    break;
                case ".entry": ReadKernel(); break;
                case ".func":
                    throw Error(token,
                    "functions are not supported: everything is inlined");
                case ";": break;
                default: throw Error(token, $"unexpected \"{token.Text}\"");
            }
        }
    }

    private void ReadFile()
    {
        int number = Integer();
        _files[number] = Path.GetFileName(Next().Text);
        while (_at < _tokens.Count && Peek() == ",") { _at++; _at++; }
    }

    private void SkipBlock()
    {
        while (Next().Text != "{") { }
        for (int depth = 1; depth > 0;)
        {
            string text = Next().Text;
            depth += text == "{" ? 1 : text == "}" ? -1 : 0;
        }
    }

    private void ReadVariable(Dictionary<string, PtxVariable> into, bool isExtern)
    {
        var token = Next();
        var space = token.Text switch
        {
            ".global" => Space.Global,
            ".const" => Space.Const,
            ".shared" => Space.Shared,
            ".local" => Space.Local,
            _ => throw Error(token, $"unknown state space \"{token.Text}\""),
        };
        int align = 0;
        string type = "";
        while (Peek().StartsWith('.'))
        {
            string word = Next().Text;
            if (word == ".align") align = Integer();
            else type = word[1..];
        }
        int size = SizeOf(type);
        do
        {
            string name = Next().Text;
            long count = 1;
            bool sized = true;
            while (Peek() == "[")
            {
                _at++;
                if (Peek() == "]") sized = false;
                else count *= Integer();
                Expect("]");
            }
            byte[]? initial = null;
            if (Peek() == "=")
            {
                _at++;
                initial = ReadInitial(size, checked((int)(count * size)));
            }
            into[name] = new(name, space, Math.Max(align, size), sized ? checked((int)count * size)
                : 0,
                initial, isExtern || !sized);
        }
        while (Next().Text == ",");
    }

    private byte[] ReadInitial(int size, int bytes)
    {
        var data = new byte[bytes];
        int at = 0;
        bool list = Peek() == "{";
        if (list) _at++;
        while (true)
        {
            bool negative = Peek() == "-";
            if (negative) _at++;
            var token = Next();
            ulong value = Literal.Bits(token.Text, size, isFloat: false)
                ?? throw Error(token, $"initial value \"{token.Text}\" is not a number");
            if (negative) value = 0 - value;
            if (at + size > bytes) throw Error(token, "too many initial values");
            for (int b = 0; b < size; b++) data[at++] = (byte)(value >> (8 * b));
            if (!list || Next().Text == "}") return data;
        }
    }

    private void ReadKernel()
    {
        var name = Next();
        var kernel = new PtxKernel(name.Text) { Line = name.Line };
        Expect("(");
        int offset = 0;
        while (Peek() != ")")
        {
            Expect(".param");
            int align = 0;
            string type = "";
            while (Peek().StartsWith('.'))
            {
                string word = Next().Text;
                if (word == ".align") align = Integer();
                else if (word is not (".ptr" or ".global" or ".const" or ".shared" or ".local"))
                    type = type.Length == 0 ? word[1..] : type;
            }
            string parameter = Next().Text;
            int size = SizeOf(type), bytes = size;
            if (Peek() == "[")
            {
                _at++;
                bytes = Integer() * size;
                Expect("]");
            }
            align = Math.Max(align, size);
            // .ptr .align states the pointee's alignment, not the parameter's.
            if (bytes == size) align = size;
            offset = (offset + align - 1) / align * align;
            kernel.Parameters.Add(new(parameter, type, align, bytes, offset));
            offset += bytes;
            if (Peek() == ",") _at++;
        }
        Expect(")");
        while (Peek() != "{")
        {
            var token = Next();
            int[] values = [];
            while (!Peek().StartsWith('.') && Peek() != "{")
            {
                if (Peek() == ",") _at++;
                else values = [.. values, Integer()];
            }
            if (token.Text == ".maxntid") kernel.MaxThreads = values;
            else if (token.Text == ".reqntid") kernel.RequiredThreads = values;
            else if (token.Text == ".maxnreg") kernel.MaxRegisters = values[0];
            else if (token.Text is not (".minnctapersm" or ".maxnctapersm"))
                throw Error(token, $"unknown kernel directive {token.Text}");
        }
        new BodyReader(this, kernel).Read();
        _module.Kernels[kernel.Name] = kernel;
    }

    private void NameFiles()
    {
        foreach (var (file, line, inlinedAt, kernel, at) in _locations)
        {
            var source = new SourceLine(_files.GetValueOrDefault(file, "source"), line, inlinedAt);
            kernel.Instructions[at] = kernel.Instructions[at] with { Source = source };
        }
    }

    internal PtxModule Module => _module;

    internal void Locate(int file, int line, int inlinedAt, PtxKernel kernel, int at) =>
        _locations.Add((file, line, inlinedAt, kernel, at));

    internal void ReadLocal(Dictionary<string, PtxVariable> into) =>
        ReadVariable(into, isExtern: false);

    internal void ReadFileDirective() => ReadFile();

    internal Token Next() => _at < _tokens.Count
        ? _tokens[_at++]
        : throw new PtxException("the text ends inside a statement");

    internal string Peek(int ahead = 0) => _at + ahead < _tokens.Count ? _tokens[_at + ahead].Text
        : "";

    internal Token Current => _tokens[Math.Min(_at, _tokens.Count - 1)];

    internal int Position { get => _at; set => _at = value; }

    internal string TextBetween(int from, int to) =>
        string.Join(' ', _tokens.GetRange(from, to - from).Select(t => t.Text))
            .Replace(" ,", ",").Replace("[ ", "[").Replace(" ]", "]").Replace("{ ", "{")
            .Replace(" }", "}").Replace(" + ", "+").Replace(" ;", "").Replace("+- ", "-");

    internal void Expect(string text)
    {
        var token = Next();
        if (token.Text != text) throw Error(token, $"expected \"{text}\", got \"{token.Text}\"");
    }

    internal int Integer()
    {
        var token = Next();
        return Literal.Bits(token.Text, 4, isFloat: false) is { } value
            ? (int)value
            : throw Error(token, $"expected a number, got \"{token.Text}\"");
    }

    internal static PtxException Error(Token token, string message) =>
        new($"PTX line {token.Line.ToString(CultureInfo.InvariantCulture)}: {message}");

    internal static int SizeOf(string type) => type switch
    {
        "b8" or "s8" or "u8" => 1,
        "b16" or "s16" or "u16" or "f16" or "bf16" => 2,
        "b32" or "s32" or "u32" or "f32" or "f16x2" or "bf16x2" => 4,
        "b64" or "s64" or "u64" or "f64" => 8,
        _ => throw new PtxException($"type .{type} is not known"),
    };
}
