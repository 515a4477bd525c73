namespace MiniCpmNative.GpuEmulator.Ptx;

/// <summary>
/// Reads the braces of one kernel: declarations, labels, instructions. Scopes nest (inline assembly
/// opens them); a register declared inside hides one of the same name outside, and so does a label.
/// </summary>
internal sealed class BodyReader(PtxParser parser, PtxKernel kernel)
{
    private readonly List<Dictionary<string, PtxRegister>> _scopes = [];
    private readonly Dictionary<string, PtxVariable> _variables = [];
    private (int File, int Line, int InlinedAt) _location;
    private int _innerLabels;

    public void Read()
    {
        ReadScope();
        foreach (var variable in _variables.Values) kernel.Variables.Add(variable);
    }

    private void ReadScope()
    {
        parser.Expect("{");
        _scopes.Add([]);
        var labels = new Dictionary<string, string>();
        int first = kernel.Instructions.Count;
        while (parser.Peek() != "}")
        {
            string word = parser.Peek();
            if (word == "{") ReadScope();
            else if (word == ".reg") ReadRegisters();
            else if (word is ".shared" or ".local") parser.ReadLocal(_variables);
            else if (word == ".loc") ReadLocation();
            else if (word == ".pragma") { while (parser.Next().Text != ";") { } }
            else if (word == ".file") { parser.Next(); parser.ReadFileDirective(); }
            else if (word == ";") parser.Next();
            else if (parser.Peek(1) == ":")
            {
                string label = parser.Next().Text;
                if (_scopes.Count > 1) label = labels[label] = $"{label}#{++_innerLabels}";
                kernel.Labels[label] = kernel.Instructions.Count;
                parser.Next();
            }
            else ReadInstruction();
        }
        parser.Expect("}");
        _scopes.RemoveAt(_scopes.Count - 1);
        // Branches may come before the label of their scope: they are directed at its end.
        for (int n = first; labels.Count > 0 && n < kernel.Instructions.Count; n++)
        {
            var i = kernel.Instructions[n];
            if (i.Opcode.StartsWith("bra", StringComparison.Ordinal) && i.Operands.Length == 1
                && labels.TryGetValue(i.Operands[0].Text, out string? inner))
                kernel.Instructions[n] = i with { Operands = [i.Operands[0] with { Text = inner }] };
        }
    }

    private void ReadRegisters()
    {
        parser.Next();
        string type = parser.Next().Text[1..];
        do
        {
            string name = parser.Next().Text;
            if (parser.Peek() == "<")
            {
                parser.Next();
                int count = parser.Integer();
                parser.Expect(">");
                for (int i = 0; i < count; i++) Declare($"{name}{i}", type);
            }
            else Declare(name, type);
        }
        while (parser.Next().Text == ",");
    }

    private void Declare(string name, string type)
    {
        var register = new PtxRegister(name, type, kernel.Registers.Count);
        kernel.Registers.Add(register);
        _scopes[^1][name] = register;
    }

    // .loc file line column[, function_name NAME[+n], inlined_at file line column]
    private void ReadLocation()
    {
        parser.Next();
        int file = parser.Integer(), line = parser.Integer();
        parser.Integer();
        int inlinedAt = 0;
        while (parser.Peek() == ",")
        {
            parser.Next();
            if (parser.Next().Text == "function_name")
            {
                parser.Next();
                while (parser.Peek() == "+") { parser.Next(); parser.Next(); }
            }
            else
            {
                parser.Integer();
                inlinedAt = parser.Integer();
                parser.Integer();
            }
        }
        _location = (file, line, inlinedAt);
    }

    private void ReadInstruction()
    {
        int start = parser.Position;
        var first = parser.Current;
        PtxRegister? guard = null;
        bool negated = false;
        if (parser.Peek() == "@")
        {
            parser.Next();
            if (parser.Peek() == "!") { parser.Next(); negated = true; }
            var name = parser.Next();
            guard = Find(name.Text) ?? throw PtxParser.Error(name,
                $"guard {name.Text} is not declared");
        }
        string opcode = parser.Next().Text;
        var operands = new List<PtxOperand>();
        while (parser.Peek() != ";")
        {
            operands.Add(ReadOperand());
            if (parser.Peek() == ",") parser.Next();
            else if (parser.Peek() != ";")
                throw PtxParser.Error(parser.Current,
                    $"unexpected \"{parser.Peek()}\" after an operand");
        }
        string text = parser.TextBetween(start, parser.Position);
        parser.Expect(";");
        parser.Locate(_location.File, _location.Line, _location.InlinedAt, kernel,
            kernel.Instructions.Count);
        kernel.Instructions.Add(new(opcode, [.. operands], guard, negated, first.Line, default,
            text));
    }

    private PtxOperand ReadOperand()
    {
        var token = parser.Next();
        switch (token.Text)
        {
            case "[":
                return ReadAddress();
            case "{":
                var elements = new List<PtxOperand>();
                while (parser.Peek() != "}")
                {
                    elements.Add(ReadOperand());
                    if (parser.Peek() == ",") parser.Next();
                }
                parser.Expect("}");
                return new(OperandKind.Vector, "{}") { Elements = [.. elements] };
            case "-":
                return new(OperandKind.Immediate, parser.Next().Text) { Negated = true };
            case "!":
                return ReadOperand() with { Negated = true };
        }
        var operand = token.Text == "_" ? new(OperandKind.Sink, "_") : ReadName(token);
        if (parser.Peek() == "|")
        {
            parser.Next();
            var second = ReadOperand();
            return new(OperandKind.Pair, operand.Text) { Elements = [operand, second] };
        }
        if (parser.Peek() == "+" && operand.Kind == OperandKind.Symbol)
        {
            parser.Next();
            return operand with { Offset = ReadOffset() };
        }
        return operand;
    }

    private PtxOperand ReadName(Token token)
    {
        string text = token.Text;
        if (Find(text) is { } register)
            return new(OperandKind.Register, text) { Register = register };
        if (text[0] == '%') return new(OperandKind.Special, text);
        if (char.IsAsciiDigit(text[0])) return new(OperandKind.Immediate, text);
        return new(OperandKind.Symbol, text)
        {
            Variable = _variables.GetValueOrDefault(
                text) ?? parser.Module.Variables.GetValueOrDefault(text),
            Parameter = kernel.Parameters.Find(p => p.Name == text),
        };
    }

    private PtxOperand ReadAddress()
    {
        var name = parser.Next();
        var inner = ReadName(name);
        long offset = 0;
        if (inner.Kind == OperandKind.Immediate)
            offset = (long)(Literal.Bits(name.Text, 8, false) ?? 0);
        if (parser.Peek() is "+" or "-")
        {
            bool minus = parser.Next().Text == "-";
            offset += minus ? -ReadOffset() : ReadOffset();
        }
        // A tensor map and its coordinates: [map, {x, y}].
        PtxOperand[] coordinates = [];
        if (parser.Peek() == ",")
        {
            parser.Next();
            coordinates = ReadOperand().Elements;
        }
        parser.Expect("]");
        return inner with
        {
            Kind = OperandKind.Address,
            Offset = offset,
            Elements = coordinates,
        };
    }

    private long ReadOffset()
    {
        bool minus = parser.Peek() == "-";
        if (minus) parser.Next();
        long value = (long)(Literal.Bits(parser.Peek(), 8, false)
            ?? throw PtxParser.Error(parser.Current,
            $"offset \"{parser.Peek()}\" is not a number"));
        parser.Next();
        return minus ? -value : value;
    }

    private PtxRegister? Find(string name)
    {
        for (int scope = _scopes.Count - 1; scope >= 0; scope--)
            if (_scopes[scope].TryGetValue(name, out var register)) return register;
        return null;
    }
}
