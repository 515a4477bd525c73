// Makes everything in this folder that training starts from: the picture data sets and the untrained
// tiny model with its tokenizer. Run from the repository root:
//
//   dotnet run examples/make.cs          the committed pictures and rows (pictures/, train.json, test.json)
//   dotnet run examples/make.cs base     examples/output/base: rows for pre-training, random model
//   dotnet run examples/make.cs ocr      the committed words and rows of ocr/
//   dotnet run examples/make.cs ocr-base examples/output/ocr-base: words to pre-train on, random model
//
// Pictures show one to three coloured shapes on a 2 x 2 board. The base model is pre-trained on plain
// questions about them. The example's rows ask for something it has never seen: what it sees in a
// made-up language, Tolu, with a word for each colour and shape. The second example reads Tolu's own
// letters; its base model has learned the Latin ones. All numbers come from one seeded generator, so
// that every run of this program gives the same bytes.
#:property TreatWarningsAsErrors=false
#:property RestorePackagesWithLockFile=false
#:property PublishAot=false

using System.Buffers.Binary;
using System.IO.Compression;
using System.Text;
using System.Text.Encodings.Web;
using System.Text.Json;
using System.Text.Json.Nodes;
using System.Text.RegularExpressions;

string examples = Path.GetFullPath(Path.Combine(AppContext.GetData("EntryPointFileDirectoryPath") as string ?? "examples"));
if (args is [] or ["pictures"])
{
    Rows.Write(examples, "train.json", "pictures/train", 400, seed: 1, Rows.Tolu);
    Rows.Write(examples, "test.json", "pictures/test", 100, seed: 2, Rows.Tolu);
}
else if (args is ["base", ..])
{
    string folder = Path.Combine(examples, "output", "base");
    int rows = args.Length > 1 ? int.Parse(args[1]) : 24000;
    Rows.Write(folder, "train.json", "pictures/train", rows, seed: 3, Rows.Plain);
    Rows.Write(folder, "test.json", "pictures/test", 200, seed: 4, Rows.Plain);
    Model.Write(Path.Combine(folder, "model"), Rows.Texts(folder, "train.json"));
}
else if (args is ["ocr"])
{
    string folder = Path.Combine(examples, "ocr");
    HashSet<string> trained = Words.Write(folder, "train", 400, seed: 6, tolu: true, not: []);
    Words.Write(folder, "test", 100, seed: 7, tolu: true, not: trained);
}
else if (args is ["ocr-base", ..])
{
    string folder = Path.Combine(examples, "output", "ocr-base");
    int rows = args.Length > 1 ? int.Parse(args[1]) : 16000;
    HashSet<string> trained = Words.Write(folder, "train", rows, seed: 8, tolu: false, not: []);
    Words.Write(folder, "test", 200, seed: 9, tolu: false, not: trained);
    OcrModel.Write(Path.Combine(folder, "model"), Path.Combine(
        examples, "..", "tests", "reference", "ocr", "model", "chat_template.jinja"));
}
else
{
    Console.Error.WriteLine(
        "usage: dotnet run examples/make.cs [pictures | base [rows] | ocr | ocr-base [rows]]");
    return 2;
}

return 0;

// splitmix64: the same numbers on every machine and with every version of the runtime.
sealed class Numbers(ulong state)
{
    public int Below(int limit)
    {
        state += 0x9E3779B97F4A7C15;
        ulong z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return (int)Math.BigMul(z ^ (z >> 31), (ulong)limit, out _);
    }

    public double Normal()
    {
        double sum = 0;
        for (int i = 0; i < 12; i++) sum += Below(1 << 30) / (double)(1 << 30);
        return sum - 6;
    }

    public T[] Shuffled<T>(IEnumerable<T> items)
    {
        T[] list = [.. items];
        for (int i = list.Length - 1; i > 0; i--)
        {
            int j = Below(i + 1);
            (list[i], list[j]) = (list[j], list[i]);
        }

        return list;
    }
}

sealed record Shape(int Kind, int Colour, int Place)
{
    public static readonly string[] Kinds = ["circle", "square", "triangle", "cross"];
    public static readonly string[] Colours = ["red", "green", "blue", "yellow", "black", "purple"];
    public static readonly string[] Places = ["top left", "top right", "bottom left", "bottom right"];

    static readonly string[] s_toluKinds = ["bimo", "kesh", "tiru", "wap"];
    static readonly string[] s_toluColours = ["rano", "gelu", "zubi", "yashi", "nok", "pavu"];

    public string Plain => $"{Colours[Colour]} {Kinds[Kind]}";

    public string ToluKind => s_toluKinds[Kind];

    public string ToluColour => s_toluColours[Colour];

    public string Tolu => $"{ToluColour} {ToluKind}";
}

sealed class Picture(int width = 56, int height = 56, byte paper = 250)
{
    static readonly (byte R, byte G, byte B)[] s_colours =
        [(220, 30, 30), (30, 160, 50), (40, 70, 220), (240, 200, 20), (20, 20, 20), (150, 50, 180)];

    readonly byte[] _pixels = [.. Enumerable.Repeat(paper, width * height * 3)];

    public void Draw(Shape shape, Numbers numbers)
    {
        int cell = width / 2, radius = 9 + numbers.Below(4);
        int cx = (shape.Place % 2 * cell) + (cell / 2) + numbers.Below(3) - 1;
        int cy = (shape.Place / 2 * cell) + (cell / 2) + numbers.Below(3) - 1;
        var (r, g, b) = s_colours[shape.Colour];
        int tint = numbers.Below(31) - 15;
        for (int y = Math.Max(0, cy - radius); y <= Math.Min(height - 1, cy + radius); y++)
        {
            for (int x = Math.Max(0, cx - radius); x <= Math.Min(width - 1, cx + radius); x++)
            {
                if (!Inside(shape.Kind, x - cx, y - cy, radius)) continue;
                Set(x, y, r + tint, g + tint, b + tint);
            }
        }
    }

    // A glyph of 5 x 7, each of its dots some pixels wide and high.
    public void Draw(string glyph, int left, int top, int wide, int high, int ink)
    {
        for (int y = 0; y < 7 * high; y++)
            for (int x = 0; x < 5 * wide; x++)
                if (glyph[(y / high * 6) + (x / wide)] == '#') Set(left + x, top + y, ink, ink, ink);
    }

    void Set(int x, int y, params ReadOnlySpan<int> colour)
    {
        for (int i = 0; i < 3; i++)
            _pixels[(((y * width) + x) * 3) + i] = (byte)Math.Clamp(colour[i], 0, 255);
    }

    static bool Inside(int kind, int x, int y, int radius) => kind switch
    {
        0 => (x * x) + (y * y) <= radius * radius,
        1 => Math.Max(Math.Abs(x), Math.Abs(y)) <= radius - 1,
        2 => 2 * Math.Abs(x) <= y + radius,
        _ => Math.Min(Math.Abs(x), Math.Abs(y)) <= radius / 4,
    };

    public void Save(string path)
    {
        Directory.CreateDirectory(Path.GetDirectoryName(path)!);
        using var file = File.Create(path);
        file.Write([0x89, 0x50, 0x4E, 0x47, 13, 10, 26, 10]);
        var header = new byte[13];
        BinaryPrimitives.WriteInt32BigEndian(header, width);
        BinaryPrimitives.WriteInt32BigEndian(header.AsSpan(4), height);
        (header[8], header[9]) = (8, 2);
        Chunk(file, "IHDR", header);
        var data = new MemoryStream();
        using (var zlib = new ZLibStream(data, CompressionLevel.SmallestSize, leaveOpen: true))
        {
            for (int y = 0; y < height; y++)
            {
                // Filter "up": most rows equal the one above, and become zeros.
                zlib.WriteByte(2);
                for (int i = y * width * 3; i < (y + 1) * width * 3; i++)
                    zlib.WriteByte((byte)(_pixels[i] - (y > 0 ? _pixels[i - (width * 3)] : 0)));
            }
        }

        Chunk(file, "IDAT", data.ToArray());
        Chunk(file, "IEND", []);
    }

    static void Chunk(Stream file, string type, byte[] data)
    {
        byte[] body = [.. Encoding.ASCII.GetBytes(type), .. data];
        uint crc = 0xFFFFFFFF;
        foreach (byte value in body)
        {
            crc ^= value;
            for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ ((crc & 1) * 0xEDB88320);
        }

        var number = new byte[4];
        BinaryPrimitives.WriteInt32BigEndian(number, data.Length);
        file.Write(number);
        file.Write(body);
        BinaryPrimitives.WriteUInt32BigEndian(number, ~crc);
        file.Write(number);
    }
}

static class Rows
{
    static readonly JsonSerializerOptions s_json = new() { Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping };
    static readonly string[] s_numbers = ["none", "one", "two", "three"];

    public delegate (List<List<Shape>> Pictures, List<string> Turns) Maker(Numbers numbers);

    public static void Write(
        string folder, string file, string pictures, int count, ulong seed, Maker maker)
    {
        var numbers = new Numbers(seed * 1000003);
        string target = Path.Combine(folder, pictures);
        if (Directory.Exists(target)) Directory.Delete(target, recursive: true);
        var rows = new JsonArray();
        for (int i = 0; i < count; i++)
        {
            var (boards, turns) = maker(numbers);
            var names = new List<string>();
            foreach (var board in boards)
            {
                var picture = new Picture();
                foreach (Shape shape in board) picture.Draw(shape, numbers);
                string name = $"{pictures}/{i:D4}{(boards.Count > 1 ? "ab"[names.Count] : "")}.png";
                picture.Save(Path.Combine(folder, name));
                names.Add(name);
            }

            rows.Add(Row(i, names, turns));
        }

        Save(Path.Combine(folder, file), rows);
    }

    public static void Save(string path, JsonArray rows)
    {
        using var stream = File.Create(path);
        stream.Write("[\n"u8);
        for (int i = 0; i < rows.Count; i++)
        {
            stream.Write(Encoding.UTF8.GetBytes(rows[i]!.ToJsonString(s_json)));
            stream.Write(i + 1 < rows.Count ? ",\n"u8 : "\n]\n"u8);
        }

        Console.WriteLine($"{path}: {rows.Count} rows");
    }

    public static JsonObject Row(int id, List<string> names, List<string> turns)
    {
        JsonNode image = names.Count == 1
            ? names[0]
            : new JsonObject { ["<image_00>"] = names[0], ["<image_01>"] = names[1] };
        string tags = names.Count == 1 ? "<image>\n" : "<image_00>\n<image_01>\n";
        var conversation = new JsonArray();
        for (int t = 0; t < turns.Count; t++)
        {
            conversation.Add(new JsonObject
            {
                ["role"] = t % 2 == 0 ? "user" : "assistant",
                ["content"] = (t == 0 ? tags : "") + turns[t],
            });
        }

        return new JsonObject { ["id"] = $"{id}", ["image"] = image, ["conversations"] = conversation };
    }

    public static IEnumerable<string> Texts(string folder, string file)
    {
        foreach (JsonNode? row in JsonNode.Parse(File.ReadAllBytes(Path.Combine(folder, file)))!.AsArray())
            foreach (JsonNode? turn in row!["conversations"]!.AsArray())
                yield return (string)turn!["content"]!;
    }

    // Shapes of different kinds, colours and places, so that each question has one answer.
    static List<Shape> Board(Numbers numbers, int most)
    {
        int count = 1 + numbers.Below(most);
        int[] kinds = numbers.Shuffled(Enumerable.Range(0, 4));
        int[] colours = numbers.Shuffled(Enumerable.Range(0, 6));
        int[] places = numbers.Shuffled(Enumerable.Range(0, 4));
        return [.. Enumerable.Range(0, count).Select(i => new Shape(kinds[i], colours[i], places[i]))];
    }

    public static (List<List<Shape>>, List<string>) Plain(Numbers numbers)
    {
        if (numbers.Below(10) == 0) return PlainTwo(numbers);
        var board = Board(numbers, numbers.Below(3) == 0 ? 3 : 1);
        var turns = new List<string>();
        int questions = 2 + numbers.Below(3);
        foreach (int kind in numbers.Shuffled(Enumerable.Range(0, 6)).Take(questions))
        {
            Shape shape = board[numbers.Below(board.Count)];
            string name = Shape.Kinds[shape.Kind], colour = Shape.Colours[shape.Colour];
            string place = Shape.Places[shape.Place];
            turns.AddRange(kind switch
            {
                0 => [$"What colour is the {name}?", $"{colour}"],
                1 => [$"Which shape is {colour}?", $"{name}"],
                2 => ["How many shapes are there?", s_numbers[board.Count]],
                3 => [$"Where is the {name}?", place],
                4 => [$"What is at the {place}?", $"a {shape.Plain}"],
                _ => ["Describe the picture.", Description(board)],
            });
        }

        return ([board], turns);
    }

    static (List<List<Shape>>, List<string>) PlainTwo(Numbers numbers)
    {
        var boards = new List<List<Shape>> { Board(numbers, 1), Board(numbers, 1) };
        int asked = numbers.Below(2);
        return (boards,
        [
            $"What is in the {(asked == 0 ? "first" : "second")} picture?", $"a {boards[asked][0].Plain}",
        ]);
    }

    static string Description(List<Shape> board) => string.Join(
        ", ", board.OrderBy(s => s.Place).Select(s => $"{s.Plain} {Shape.Places[s.Place]}"));

    public static (List<List<Shape>>, List<string>) Tolu(Numbers numbers)
    {
        Shape shape = Board(numbers, 1)[0];
        switch (numbers.Below(6))
        {
            case 0:
                var boards = new List<List<Shape>> { new() { shape }, Board(numbers, 1) };
                int asked = numbers.Below(2);
                return (boards,
                [
                    $"What is in the {(asked == 0 ? "first" : "second")} picture? Answer in Tolu.",
                    boards[asked][0].Tolu,
                ]);
            case 1:
                return ([[shape]],
                [
                    "Which colour is it, in Tolu?", shape.ToluColour,
                    "And which shape?", shape.ToluKind,
                    $"What is it at the {Shape.Places[shape.Place]}?", shape.Tolu,
                ]);
            default:
                return ([[shape]], ["Describe the picture in Tolu.", shape.Tolu]);
        }
    }
}

// A model of MiniCPM-V-2_6's shape with random weights, and a byte-level BPE tokenizer for its texts.
// One part is not random: the resampler's queries start as the positions of a 4 x 4 grid and its query
// and key projections as copies, so that each query looks at its own part of the picture from the
// beginning. Learning that from nothing would take most of the training.
static class Model
{
    const int Hidden = 256, Layers = 4, Heads = 2, KvHeads = 1, Intermediate = 512;
    const int Vision = 144, VisionLayers = 3, VisionIntermediate = 288, Queries = 16, Side = 24, Patch = 14;
    static readonly string[] s_special =
    [
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "</image>", "<ref>", "</ref>", "<box>",
        "</box>", "<quad>", "</quad>", "<point>", "</point>", "<slice>", "</slice>", "<image_id>",
        "</image_id>", "<unk>",
    ];

    static readonly JsonSerializerOptions s_json = new()
    {
        WriteIndented = true,
        Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping,
    };

    const string Split =
        @"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    public static void Write(string folder, IEnumerable<string> texts)
    {
        Directory.CreateDirectory(folder);
        string[] template = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "0123456789"];
        int tokens = Tokenizer(folder, texts.Concat(Enumerable.Repeat(template, 1000).SelectMany(t => t)),
            most: 200, s_special, new JsonObject
            {
                ["chat_template"] = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
                    + "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
                    + "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
                    + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
                ["tokenizer_class"] = "MiniCPMVTokenizerFast",
            });
        int vocabulary = (tokens + 63) / 64 * 64;
        Config(folder, vocabulary);
        Weights(Path.Combine(folder, "model.safetensors"), vocabulary);
        Console.WriteLine($"{folder}: random model, {tokens} tokens");
    }

    // Greedy byte pair encoding: join the most frequent neighbours, ties by text, until enough merges.
    public static int Tokenizer(
        string folder, IEnumerable<string> texts, int most, string[] special, JsonObject config)
    {
        string[] letters = ByteLetters();
        var words = new Dictionary<string, long>();
        foreach (string text in texts)
            foreach (Match match in Regex.Matches(text, Split))
                words[match.Value] = words.GetValueOrDefault(match.Value) + 1;
        var pieces = words.OrderBy(w => w.Key, StringComparer.Ordinal)
            .Select(w => (Parts: Encoding.UTF8.GetBytes(w.Key).Select(b => letters[b]).ToList(), w.Value))
            .ToList();
        var merges = new List<(string, string)>();
        while (merges.Count < most)
        {
            var pairs = new Dictionary<(string, string), long>();
            foreach (var (parts, count) in pieces)
                for (int i = 0; i + 1 < parts.Count; i++)
                    pairs[(parts[i], parts[i + 1])] = pairs.GetValueOrDefault((parts[i], parts[i + 1])) + count;
            if (pairs.Count == 0) break;
            var (a, b) = pairs.OrderByDescending(p => p.Value)
                .ThenBy(p => p.Key.Item1 + " " + p.Key.Item2, StringComparer.Ordinal).First().Key;
            merges.Add((a, b));
            foreach (var (parts, _) in pieces)
            {
                for (int i = 0; i + 1 < parts.Count; i++)
                {
                    if (parts[i] != a || parts[i + 1] != b) continue;
                    parts[i] = a + b;
                    parts.RemoveAt(i + 1);
                }
            }
        }

        var names = letters.OrderBy(l => l, StringComparer.Ordinal)
            .Concat(merges.Select(m => m.Item1 + m.Item2)).Distinct().ToList();
        var vocabulary = new JsonObject();
        for (int i = 0; i < names.Count; i++) vocabulary[names[i]] = i;
        var added = new JsonArray();
        var decoder = new JsonObject();
        for (int i = 0; i < special.Length; i++)
        {
            var flags = new JsonObject
            {
                ["content"] = special[i],
                ["lstrip"] = false,
                ["normalized"] = false,
                ["rstrip"] = false,
                ["single_word"] = false,
                ["special"] = true,
            };
            decoder[$"{names.Count + i}"] = flags.DeepClone();
            flags.Insert(0, "id", names.Count + i);
            added.Add(flags);
        }

        Json(folder, "tokenizer.json", new JsonObject
        {
            ["version"] = "1.0",
            ["truncation"] = null,
            ["padding"] = null,
            ["added_tokens"] = added,
            ["normalizer"] = new JsonObject { ["type"] = "NFC" },
            ["pre_tokenizer"] = new JsonObject
            {
                ["type"] = "Sequence",
                ["pretokenizers"] = new JsonArray(
                    new JsonObject
                    {
                        ["type"] = "Split",
                        ["pattern"] = new JsonObject { ["Regex"] = Split },
                        ["behavior"] = "Isolated",
                        ["invert"] = false,
                    },
                    ByteLevel(false)),
            },
            ["post_processor"] = ByteLevel(false),
            ["decoder"] = ByteLevel(false),
            ["model"] = new JsonObject
            {
                ["type"] = "BPE",
                ["dropout"] = null,
                ["unk_token"] = null,
                ["continuing_subword_prefix"] = "",
                ["end_of_word_suffix"] = "",
                ["fuse_unk"] = false,
                ["byte_fallback"] = false,
                ["ignore_merges"] = false,
                ["vocab"] = vocabulary,
                ["merges"] = new JsonArray([.. merges.Select(m => new JsonArray(m.Item1, m.Item2))]),
            },
        });
        foreach (var (key, value) in new JsonObject
        {
            ["add_prefix_space"] = false,
            ["added_tokens_decoder"] = decoder,
            ["bos_token"] = "<|im_start|>",
            ["clean_up_tokenization_spaces"] = false,
            ["eos_token"] = "<|im_end|>",
            ["model_max_length"] = 2048,
            ["pad_token"] = "<|endoftext|>",
            ["unk_token"] = "<unk>",
        })
            config[key] = value?.DeepClone();
        Json(folder, "tokenizer_config.json",
            new JsonObject(config.OrderBy(p => p.Key, StringComparer.Ordinal)
                .Select(p => KeyValuePair.Create(p.Key, p.Value?.DeepClone()))));
        return names.Count + special.Length;
    }

    static JsonObject ByteLevel(bool prefix) => new()
    {
        ["type"] = "ByteLevel",
        ["add_prefix_space"] = prefix,
        ["trim_offsets"] = false,
        ["use_regex"] = false,
    };

    // GPT-2's printable letter for each byte.
    static string[] ByteLetters()
    {
        var letters = new string[256];
        int next = 256;
        for (int b = 0; b < 256; b++)
        {
            bool printable = b is (>= '!' and <= '~') or (>= 0xA1 and <= 0xAC) or (>= 0xAE and <= 0xFF);
            letters[b] = ((char)(printable ? b : next++)).ToString();
        }

        return letters;
    }

    static void Config(string folder, int vocabulary)
    {
        Json(folder, "config.json", new JsonObject
        {
            ["architectures"] = new JsonArray("MiniCPMV"),
            ["attention_dropout"] = 0.0,
            ["batch_vision_input"] = true,
            ["bos_token_id"] = vocabulary - 1,
            ["drop_vision_last_layer"] = false,
            ["hidden_act"] = "silu",
            ["hidden_size"] = Hidden,
            ["image_size"] = 448,
            ["initializer_range"] = 0.02,
            ["intermediate_size"] = Intermediate,
            ["max_position_embeddings"] = 2048,
            ["model_type"] = "minicpmv",
            ["num_attention_heads"] = Heads,
            ["num_hidden_layers"] = Layers,
            ["num_key_value_heads"] = KvHeads,
            ["patch_size"] = Patch,
            ["query_num"] = Queries,
            ["rms_norm_eps"] = 1e-6,
            ["rope_theta"] = 10000.0,
            ["slice_config"] = new JsonObject
            {
                ["max_slice_nums"] = 4,
                ["patch_size"] = Patch,
                ["scale_resolution"] = 56,
            },
            ["slice_mode"] = true,
            ["tie_word_embeddings"] = false,
            ["torch_dtype"] = "bfloat16",
            ["use_image_id"] = true,
            ["use_sliding_window"] = false,
            ["version"] = 2.6,
            ["vision_batch_size"] = 16,
            ["vision_config"] = new JsonObject
            {
                ["hidden_act"] = "gelu_pytorch_tanh",
                ["hidden_size"] = Vision,
                ["image_size"] = Side * Patch,
                ["intermediate_size"] = VisionIntermediate,
                ["layer_norm_eps"] = 1e-6,
                ["model_type"] = "siglip",
                ["num_attention_heads"] = 2,
                ["num_channels"] = 3,
                ["num_hidden_layers"] = VisionLayers,
                ["patch_size"] = Patch,
            },
            ["vocab_size"] = vocabulary,
        });
        Json(folder, "preprocessor_config.json", new JsonObject
        {
            ["image_processor_type"] = "MiniCPMVImageProcessor",
            ["processor_class"] = "MiniCPMVProcessor",
            ["max_slice_nums"] = 4,
            ["scale_resolution"] = 56,
            ["patch_size"] = Patch,
            ["use_image_id"] = true,
            ["image_feature_size"] = Queries,
            ["im_start"] = "<image>",
            ["im_end"] = "</image>",
            ["slice_start"] = "<slice>",
            ["slice_end"] = "</slice>",
            ["unk"] = "<unk>",
            ["im_id_start"] = "<image_id>",
            ["im_id_end"] = "</image_id>",
            ["slice_mode"] = true,
            ["norm_mean"] = new JsonArray(0.5, 0.5, 0.5),
            ["norm_std"] = new JsonArray(0.5, 0.5, 0.5),
            ["version"] = 2.6,
        });
    }

    public static void Json(string folder, string name, JsonObject value) =>
        File.WriteAllText(Path.Combine(folder, name), value.ToJsonString(s_json) + "\n");

    static void Weights(string path, int vocabulary)
    {
        var tensors = new List<(string Name, int[] Shape, double Scale, double Mean)>();
        Linear("llm.model.embed_tokens", vocabulary, Hidden, bias: false, scale: 0.02);
        Linear("llm.lm_head", vocabulary, Hidden, bias: false);
        for (int i = 0; i < Layers; i++)
        {
            string layer = $"llm.model.layers.{i}.";
            Norm(layer + "input_layernorm", Hidden, bias: false);
            Norm(layer + "post_attention_layernorm", Hidden, bias: false);
            Linear(layer + "self_attn.q_proj", Heads * 128, Hidden);
            Linear(layer + "self_attn.k_proj", KvHeads * 128, Hidden);
            Linear(layer + "self_attn.v_proj", KvHeads * 128, Hidden);
            Linear(layer + "self_attn.o_proj", Hidden, Heads * 128, bias: false);
            Linear(layer + "mlp.gate_proj", Intermediate, Hidden, bias: false);
            Linear(layer + "mlp.up_proj", Intermediate, Hidden, bias: false);
            Linear(layer + "mlp.down_proj", Hidden, Intermediate, bias: false);
        }

        Norm("llm.model.norm", Hidden, bias: false);
        tensors.Add(("resampler.query", [Queries, Hidden], 0, 0));
        tensors.Add(("resampler.proj", [Hidden, Hidden], 1 / Math.Sqrt(Hidden), 0));
        Linear("resampler.kv_proj", Hidden, Vision, bias: false);
        tensors.Add(("resampler.attn.in_proj_weight", [3 * Hidden, Hidden], 20 / Math.Sqrt(Hidden), 0));
        tensors.Add(("resampler.attn.in_proj_bias", [3 * Hidden], 0, 0));
        Linear("resampler.attn.out_proj", Hidden, Hidden);
        foreach (string norm in (string[])["ln_q", "ln_post"]) Norm("resampler." + norm, Hidden);
        // Small against the positions that are added for the keys; the value projection makes up for it.
        tensors.Add(("resampler.ln_kv.weight", [Hidden], 0, 0.05));
        tensors.Add(("resampler.ln_kv.bias", [Hidden], 0, 0));
        tensors.Add(("vpm.embeddings.patch_embedding.weight", [Vision, 3, Patch, Patch], 0.04, 0));
        tensors.Add(("vpm.embeddings.patch_embedding.bias", [Vision], 0, 0));
        tensors.Add(("vpm.embeddings.position_embedding.weight", [Side * Side, Vision], 0.3, 0));
        for (int i = 0; i < VisionLayers; i++)
        {
            string layer = $"vpm.encoder.layers.{i}.";
            Norm(layer + "layer_norm1", Vision);
            Norm(layer + "layer_norm2", Vision);
            foreach (string name in (string[])["q_proj", "k_proj", "v_proj", "out_proj"])
                Linear(layer + "self_attn." + name, Vision, Vision);
            Linear(layer + "mlp.fc1", VisionIntermediate, Vision);
            Linear(layer + "mlp.fc2", Vision, VisionIntermediate);
        }

        Norm("vpm.post_layernorm", Vision);
        Save(path, tensors);

        void Linear(string name, int rows, int cols, bool bias = true, double? scale = null)
        {
            tensors.Add((name + ".weight", [rows, cols], scale ?? (1 / Math.Sqrt(cols)), 0));
            if (bias) tensors.Add((name + ".bias", [rows], 0, 0));
        }

        void Norm(string name, int size, bool bias = true)
        {
            tensors.Add((name + ".weight", [size], 0, 1));
            if (bias) tensors.Add((name + ".bias", [size], 0, 0));
        }
    }

    public static void Save(string path, List<(string Name, int[] Shape, double Scale, double Mean)> tensors)
    {
        tensors.Sort((a, b) => string.CompareOrdinal(a.Name, b.Name));
        var header = new JsonObject { ["__metadata__"] = new JsonObject { ["format"] = "pt" } };
        long offset = 0;
        foreach (var (name, shape, _, _) in tensors)
        {
            long end = offset + (shape.Aggregate(1L, (a, b) => a * b) * 2);
            header[name] = new JsonObject
            {
                ["dtype"] = "BF16",
                ["shape"] = new JsonArray([.. shape.Select(s => JsonValue.Create(s))]),
                ["data_offsets"] = new JsonArray(offset, end),
            };
            offset = end;
        }

        byte[] json = Encoding.UTF8.GetBytes(header.ToJsonString());
        using var file = new BufferedStream(File.Create(path));
        using var writer = new BinaryWriter(file);
        int padding = (8 - (json.Length % 8)) % 8;
        writer.Write((long)(json.Length + padding));
        writer.Write(json);
        writer.Write(Encoding.ASCII.GetBytes(new string(' ', padding)));
        var numbers = new Numbers(5);
        foreach (var (name, shape, scale, mean) in tensors)
        {
            long count = shape.Aggregate(1L, (a, b) => a * b);
            for (int i = 0; i < count; i++)
            {
                float value = name switch
                {
                    "resampler.query" => Position(i / Hidden, i % Hidden),
                    "resampler.attn.in_proj_weight" when i < 2 * Hidden * Hidden =>
                        Copy(i / Hidden % Hidden, i % Hidden),
                    _ => (float)(mean + (scale == 0 ? 0 : scale * numbers.Normal())),
                };
                uint bits = BitConverter.SingleToUInt32Bits(value);
                writer.Write((ushort)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16));
            }
        }
    }

    // The resampler's own table of positions, at the place of a query on the grid.
    static float Position(int query, int column)
    {
        int quarter = Hidden / 4, side = (int)Math.Sqrt(Queries);
        int at = column < 2 * quarter ? query % side : query / side;
        double angle = at * Math.Pow(10000, -(double)(column % quarter) / quarter);
        return (float)(column / quarter % 2 == 0 ? Math.Sin(angle) : Math.Cos(angle));
    }

    // Each head takes every second column of the four parts, so that it sees both coordinates.
    static float Copy(int row, int column)
    {
        int head = row / (Hidden / Heads), source = (row % (Hidden / Heads) * Heads) + head;
        return source == column ? 5.5f : 0;
    }
}

// The words of the second example: up to three syllables of Tolu, in Latin letters or in its own.
static class Words
{
    const string Vowels = "aeiou", Consonants = "bghklmnprstvwyz";
    const int Letters = 7, Cell = 28;

    static readonly string[] s_latin =
    [
        ".###./#...#/#...#/#####/#...#/#...#/#...#", "#####/#..../#..../####./#..../#..../#####",
        "#####/..#../..#../..#../..#../..#../#####", ".###./#...#/#...#/#...#/#...#/#...#/.###.",
        "#...#/#...#/#...#/#...#/#...#/#...#/.###.", "####./#...#/#...#/####./#...#/#...#/####.",
        ".####/#..../#..../#..##/#...#/#...#/.####", "#...#/#...#/#...#/#####/#...#/#...#/#...#",
        "#...#/#..#./#.#../##.../#.#../#..#./#...#", "#..../#..../#..../#..../#..../#..../#####",
        "#...#/##.##/#.#.#/#...#/#...#/#...#/#...#", "#...#/##..#/##..#/#.#.#/#..##/#..##/#...#",
        "####./#...#/#...#/####./#..../#..../#....", "####./#...#/#...#/####./#.#../#..#./#...#",
        ".####/#..../#..../.###./....#/....#/####.", "#####/..#../..#../..#../..#../..#../..#..",
        "#...#/#...#/#...#/#...#/#...#/.#.#./..#..", "#...#/#...#/#...#/#...#/#.#.#/##.##/#...#",
        "#...#/#...#/.#.#./..#../..#../..#../..#..", "#####/....#/...#./..#../.#.../#..../#####",
    ];

    // Writes pictures of words that are all different, and none of them among some others.
    public static HashSet<string> Write(
        string folder, string name, int count, ulong seed, bool tolu, HashSet<string> not)
    {
        var numbers = new Numbers(seed * 1000003);
        string target = Path.Combine(folder, "words", name);
        if (Directory.Exists(target)) Directory.Delete(target, recursive: true);
        var words = new HashSet<string>();
        var rows = new JsonArray();
        while (words.Count < count)
        {
            string word = string.Concat(Enumerable.Range(0, 1 + numbers.Below(3)).Select(_ =>
                $"{Consonants[numbers.Below(Consonants.Length)]}{Vowels[numbers.Below(Vowels.Length)]}"));
            if (numbers.Below(3) == 0) word += Consonants[numbers.Below(Consonants.Length)];
            if (not.Contains(word) || !words.Add(word)) continue;
            string file = $"words/{name}/{rows.Count:D4}.png";
            Draw(word, tolu, numbers).Save(Path.Combine(folder, file));
            rows.Add(Rows.Row(rows.Count, [file], ["Text Recognition:", word]));
        }

        Rows.Save(Path.Combine(folder, name + ".json"), rows);
        return words;
    }

    static Picture Draw(string word, bool tolu, Numbers numbers)
    {
        int paper = 190 + numbers.Below(66), ink = numbers.Below(90);
        if (numbers.Below(4) == 0) (paper, ink) = (ink, paper);
        int wide = 3 + numbers.Below(2);
        var picture = new Picture(Letters * Cell, Cell, (byte)paper);
        for (int i = 0; i < word.Length; i++)
        {
            int letter = (Vowels + Consonants).IndexOf(word[i]), room = Cell - (5 * wide);
            picture.Draw(tolu ? Tolu(letter) : s_latin[letter], (i * Cell) + 1 + numbers.Below(room - 1),
                1 + numbers.Below(6), wide, 3, ink);
        }

        return picture;
    }

    // A stem with some of five strokes at it.
    static string Tolu(int letter)
    {
        var dots = Enumerable.Range(0, 7).Select(_ => "..#..".ToCharArray()).ToArray();
        int strokes = letter + 6;
        for (int i = 1; i <= 2; i++)
        {
            if ((strokes & 1) != 0) dots[0][2 + i] = '#';
            if ((strokes & 2) != 0) dots[i][2 - i] = '#';
            if ((strokes & 4) != 0) dots[3][2 + i] = '#';
            if ((strokes & 8) != 0) dots[6 - i][2 - i] = '#';
            if ((strokes & 16) != 0) dots[6][2 + i] = '#';
        }

        return string.Join('/', dots.Select(d => new string(d)));
    }
}

// A model of MiniCPM-OCR's shape with random weights, and a tokenizer of bytes, so that it writes
// letter by letter.
static class OcrModel
{
    const int Hidden = 128, Layers = 4, Interval = 2, Heads = 4, KvHeads = 2, HeadDim = 32, Intermediate = 192;
    const int KeyHeads = 2, ValueHeads = 4, DeltaDim = 32;
    const int Vision = 64, VisionLayers = 2, VisionIntermediate = 128, Side = 14, Patch = 14;

    static readonly string[] s_special =
    [
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "<|image_pad|>", "<|video_pad|>", "<think>",
        "</think>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>",
    ];

    public static void Write(string folder, string template)
    {
        Directory.CreateDirectory(folder);
        File.Copy(template, Path.Combine(folder, "chat_template.jinja"), overwrite: true);
        int tokens = Model.Tokenizer(folder, [], most: 0, s_special, new JsonObject
        {
            ["extra_special_tokens"] = new JsonObject
            {
                ["image_token"] = "<|image_pad|>",
                ["video_token"] = "<|video_pad|>",
                ["image_start_token"] = "<image>",
                ["image_end_token"] = "</image>",
                ["slice_start_token"] = "<slice>",
                ["slice_end_token"] = "</slice>",
                ["image_id_start_token"] = "<image_id>",
                ["image_id_end_token"] = "</image_id>",
            },
            ["tokenizer_class"] = "Qwen2Tokenizer",
        });
        int vocabulary = (tokens + 31) / 32 * 32;
        Config(folder, vocabulary, id: tokens - s_special.Length);
        Weights(Path.Combine(folder, "model.safetensors"), vocabulary);
        Console.WriteLine($"{folder}: random model, {tokens} tokens");
    }

    static void Config(string folder, int vocabulary, int id)
    {
        Model.Json(folder, "config.json", new JsonObject
        {
            ["architectures"] = new JsonArray("MiniCPMOcrForConditionalGeneration"),
            ["downsample_mode"] = "4x",
            ["dtype"] = "bfloat16",
            ["eos_token_id"] = id + 2,
            ["image_token_id"] = id + 4,
            ["insert_layer_id"] = 0,
            ["model_type"] = "minicpm_ocr",
            ["text_config"] = new JsonObject
            {
                ["attention_bias"] = false,
                ["head_dim"] = HeadDim,
                ["hidden_act"] = "silu",
                ["hidden_size"] = Hidden,
                ["intermediate_size"] = Intermediate,
                ["full_attention_interval"] = Interval,
                ["linear_conv_kernel_dim"] = 4,
                ["linear_key_head_dim"] = DeltaDim,
                ["linear_num_key_heads"] = KeyHeads,
                ["linear_num_value_heads"] = ValueHeads,
                ["linear_value_head_dim"] = DeltaDim,
                ["max_position_embeddings"] = 2048,
                ["model_type"] = "qwen3_5_text",
                ["num_attention_heads"] = Heads,
                ["num_hidden_layers"] = Layers,
                ["num_key_value_heads"] = KvHeads,
                ["rms_norm_eps"] = 1e-6,
                ["rope_parameters"] = new JsonObject
                {
                    ["mrope_section"] = new JsonArray(2, 1, 1),
                    ["partial_rotary_factor"] = 0.25,
                    ["rope_theta"] = 10000.0,
                    ["rope_type"] = "default",
                },
                ["tie_word_embeddings"] = true,
                ["vocab_size"] = vocabulary,
            },
            ["tie_word_embeddings"] = true,
            ["video_token_id"] = id + 5,
            ["vision_config"] = new JsonObject
            {
                ["hidden_act"] = "gelu_pytorch_tanh",
                ["hidden_size"] = Vision,
                ["image_size"] = Side * Patch,
                ["intermediate_size"] = VisionIntermediate,
                ["layer_norm_eps"] = 1e-6,
                ["model_type"] = "minicpm_ocr_vision",
                ["num_attention_heads"] = 2,
                ["num_channels"] = 3,
                ["num_hidden_layers"] = VisionLayers,
                ["patch_size"] = Patch,
            },
        });
        Model.Json(folder, "processor_config.json", new JsonObject
        {
            ["image_processor"] = new JsonObject
            {
                ["downsample_mode"] = "4x",
                ["image_mean"] = new JsonArray(0.5, 0.5, 0.5),
                ["image_processor_type"] = "MiniCPMOcrImageProcessor",
                ["image_std"] = new JsonArray(0.5, 0.5, 0.5),
                ["max_slice_nums"] = 4,
                ["patch_size"] = Patch,
                ["resample"] = 3,
                ["scale_resolution"] = 196,
                ["slice_mode"] = true,
                ["small_image_upsize"] = "never",
                ["use_image_id"] = false,
            },
            ["processor_class"] = "MiniCPMOcrProcessor",
        });
        Model.Json(folder, "generation_config.json", new JsonObject
        {
            ["bos_token_id"] = id + 1,
            ["do_sample"] = false,
            ["eos_token_id"] = new JsonArray(id, id + 2),
        });
    }

    static void Weights(string path, int vocabulary)
    {
        const int Inner = ValueHeads * DeltaDim, Mixed = (2 * KeyHeads * DeltaDim) + Inner;
        var tensors = new List<(string Name, int[] Shape, double Scale, double Mean)>();
        const string Text = "model.language_model.", Tower = "model.vision_tower.";
        tensors.Add((Text + "embed_tokens.weight", [vocabulary, Hidden], 0.05, 0));
        tensors.Add((Text + "norm.weight", [Hidden], 0, 0));
        for (int i = 0; i < Layers; i++)
        {
            bool attends = (i + 1) % Interval == 0;
            string layer = $"{Text}layers.{i}.", mixer = layer + (attends ? "self_attn." : "linear_attn.");
            // These norms multiply by 1 + weight.
            tensors.Add((layer + "input_layernorm.weight", [Hidden], 0, 0));
            tensors.Add((layer + "post_attention_layernorm.weight", [Hidden], 0, 0));
            foreach (string up in (string[])["gate_proj", "up_proj"])
                Matrix($"{layer}mlp.{up}", Intermediate, Hidden);
            Matrix(layer + "mlp.down_proj", Hidden, Intermediate);
            if (!attends)
            {
                Matrix(mixer + "in_proj_qkv", Mixed, Hidden);
                Matrix(mixer + "in_proj_z", Inner, Hidden);
                Matrix(mixer + "in_proj_a", ValueHeads, Hidden);
                Matrix(mixer + "in_proj_b", ValueHeads, Hidden);
                Matrix(mixer + "out_proj", Hidden, Inner);
                tensors.Add((mixer + "conv1d.weight", [Mixed, 1, 4], 0.3, 0));
                tensors.Add((mixer + "A_log", [ValueHeads], 0.5, 1));
                tensors.Add((mixer + "dt_bias", [ValueHeads], 1, -2));
                tensors.Add((mixer + "norm.weight", [DeltaDim], 0, 1));
                continue;
            }

            Matrix(mixer + "q_proj", 2 * Heads * HeadDim, Hidden);
            Matrix(mixer + "k_proj", KvHeads * HeadDim, Hidden);
            Matrix(mixer + "v_proj", KvHeads * HeadDim, Hidden);
            Matrix(mixer + "o_proj", Hidden, Heads * HeadDim);
            tensors.Add((mixer + "q_norm.weight", [HeadDim], 0, 0));
            tensors.Add((mixer + "k_norm.weight", [HeadDim], 0, 0));
        }

        tensors.Add((Tower + "embeddings.patch_embedding.weight", [Vision, 3, Patch, Patch], 0.04, 0));
        tensors.Add((Tower + "embeddings.patch_embedding.bias", [Vision], 0, 0));
        tensors.Add((Tower + "embeddings.position_embedding.weight", [Side * Side, Vision], 0.3, 0));
        for (int i = 0; i < VisionLayers; i++)
        {
            string layer = $"{Tower}encoder.layers.{i}.";
            Norm(layer + "layer_norm1", Vision);
            Norm(layer + "layer_norm2", Vision);
            Attention(layer + "self_attn.");
            Linear(layer + "mlp.fc1", VisionIntermediate, Vision);
            Linear(layer + "mlp.fc2", Vision, VisionIntermediate);
        }

        Norm(Tower + "post_layernorm", Vision);
        // Unused in the mode "4x", but part of every file.
        Norm(Tower + "vit_merger.layer_norm1", Vision);
        Norm(Tower + "vit_merger.pre_norm", 4 * Vision);
        Attention(Tower + "vit_merger.self_attn.");
        Linear(Tower + "vit_merger.linear_1", 4 * VisionIntermediate, 4 * Vision);
        Linear(Tower + "vit_merger.linear_2", Vision, 4 * VisionIntermediate);
        Norm("model.merger.mlp.0.pre_norm", 4 * Vision);
        Linear("model.merger.mlp.0.linear_1", 4 * Vision, 4 * Vision);
        Linear("model.merger.mlp.0.linear_2", Hidden, 4 * Vision);
        Model.Save(path, tensors);

        void Attention(string prefix)
        {
            foreach (string name in (string[])["q_proj", "k_proj", "v_proj", "out_proj"])
                Linear(prefix + name, Vision, Vision);
        }

        void Linear(string name, int rows, int cols)
        {
            Matrix(name, rows, cols);
            tensors.Add((name + ".bias", [rows], 0, 0));
        }

        void Matrix(string name, int rows, int cols) =>
            tensors.Add((name + ".weight", [rows, cols], 1 / Math.Sqrt(cols), 0));

        void Norm(string name, int size)
        {
            tensors.Add((name + ".weight", [size], 0, 1));
            tensors.Add((name + ".bias", [size], 0, 0));
        }
    }
}
